"""Prints the documentation of the standard library: a JSON list of [qualified name, docstring].

A program for a fresh interpreter, `python -I -S stdlib.py`, which imports nothing but the standard library: other
libraries patch it as they are imported, docstrings included, and so would leak into what is printed.
"""

import importlib
import inspect
import json
import re
import types
import warnings
from collections.abc import Iterator

MODULES = """
abc aifc argparse array ast asyncio.base_events asyncio.events asyncio.futures asyncio.locks asyncio.queues
asyncio.runners asyncio.streams asyncio.subprocess asyncio.tasks asyncio.timeouts asyncio.transports atexit base64 bdb
binascii bisect builtins cProfile calendar chunk cmath cmd code codecs codeop collections collections.abc colorsys
compileall concurrent.futures concurrent.futures.process concurrent.futures.thread configparser contextlib contextvars
copy csv dataclasses datetime decimal difflib dis doctest email.charset email.contentmanager email.feedparser
email.generator email.header email.headerregistry email.message email.mime.audio email.mime.base email.mime.image
email.mime.text email.parser email.policy email.utils enum errno faulthandler filecmp fileinput fnmatch fractions
ftplib functools gc genericpath getopt getpass gettext glob graphlib gzip heapq hmac html html.parser http http.client
http.cookiejar http.cookies http.server imaplib importlib.abc importlib.machinery importlib.metadata
importlib.resources importlib.util inspect io ipaddress itertools json json.decoder json.encoder keyword linecache
logging logging.config logging.handlers mailbox marshal math mimetypes modulefinder multiprocessing.connection
multiprocessing.context multiprocessing.managers multiprocessing.pool multiprocessing.queues
multiprocessing.shared_memory multiprocessing.synchronize netrc ntpath numbers operator optparse pathlib pdb pickle
pickletools pipes pkgutil platform plistlib poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue
quopri random re reprlib runpy sched secrets selectors shelve shlex shutil smtplib socketserver statistics string
stringprep struct symtable tabnanny tarfile telnetlib tempfile textwrap threading timeit token tokenize trace
traceback tracemalloc types typing unicodedata unittest.async_case unittest.case unittest.loader unittest.main
unittest.mock unittest.result unittest.runner unittest.suite urllib.error urllib.parse urllib.request urllib.response
urllib.robotparser uuid venv warnings wave weakref wsgiref.handlers wsgiref.headers wsgiref.simple_server wsgiref.util
wsgiref.validate xdrlib xml.dom.expatbuilder xml.dom.minidom xml.dom.pulldom xml.etree.ElementTree xml.sax.expatreader
xml.sax.handler xml.sax.saxutils xml.sax.xmlreader xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""
"""The modules whose documentation is read. Left out: what does something when imported, what differs between systems
(os, socket, time, ...) and what a build of Python may lack (tkinter, curses, sqlite3, ...)."""

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def _documented(module: types.ModuleType) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of a module, its public classes and functions, and their public methods."""
    yield module.__name__, module.__doc__
    package = module.__name__.partition(".")[0]
    for name, value in sorted(vars(module).items()):
        home = (getattr(value, "__module__", None) or package).partition(".")[0].lstrip("_")
        if name.startswith("_") or home != package or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        yield f"{module.__name__}.{name}", value.__doc__
        if inspect.isclass(value):
            for member, method in sorted(vars(value).items()):
                if not member.startswith("_") and (
                    inspect.isroutine(method) or isinstance(method, classmethod | staticmethod | property)
                ):
                    yield f"{module.__name__}.{name}.{member}", method.__doc__


def docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, cleaned docstring) of everything in MODULES, each text once, in the order of MODULES."""
    seen = set()
    for module in MODULES.split():
        for name, doc in _documented(importlib.import_module(module)):
            # Docstrings made up from values can hold addresses, which differ from run to run.
            if isinstance(doc, str) and not _ADDRESS.search(doc):
                text = inspect.cleandoc(doc).strip()
                if len(text) >= 20 and text not in seen:
                    seen.add(text)
                    yield name, text


if __name__ == "__main__":
    warnings.simplefilter("ignore", DeprecationWarning)
    print(json.dumps(list(docstrings())))
