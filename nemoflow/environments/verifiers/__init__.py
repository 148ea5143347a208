"""Verifiers: a module each, with `verify(answer, row, **settings) -> reward`. Light to import.

An answer is judged, whatever it is: only what is wrong with a row or a setting is raised.
"""
