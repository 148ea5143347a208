"""Several evaluations in one process that can reach no network: python eval_jobs.py JOBS.json

Each job is {"payload", "model", "sources", "out", "launch"}; its error or measures go to the file OUT/said.json.
"""

import json
import socket
import sys
from pathlib import Path

from nemoflow import evaluation
from nemoflow.errors import NemoflowError


def refuse(_, address):
    raise AssertionError(f"the network is reached: {address}")


if __name__ == "__main__":
    socket.socket.connect = refuse
    socket.socket.connect_ex = refuse
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        out.mkdir()
        inputs = {"model": Path(job["model"]), "sources": [Path(source) for source in job["sources"]]}
        try:
            said = {"measures": evaluation.evaluate(job["payload"], inputs, out, job["launch"])}
        except NemoflowError as error:
            said = {"error": str(error)}
        (out / "said.json").write_text(json.dumps(said))
