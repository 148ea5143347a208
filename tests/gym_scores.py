"""What NeMo-Gym's own verifiers say: NEMO_GYM gym_scores.py < cases, in an environment with nemo-gym 0.4.0.

A case is a line of JSON, [server, answer, row]; a line with its reward is printed for each.
"""

import json
import sys
from unittest.mock import MagicMock

from fastapi.testclient import TestClient
from nemo_gym.server_utils import ServerClient
from resources_servers.math_with_judge import app as mathematics
from resources_servers.mcqa import app as choices
from resources_servers.structured_outputs import app as schemas

NO_JUDGE = {
    "judge_model_server": {"type": "responses_api_models", "name": "none"},
    "judge_responses_create_params": {"input": []},
    "should_use_judge": False,
}
SERVERS = {
    "math": (mathematics.LibraryJudgeMathResourcesServer, mathematics.LibraryJudgeMathResourcesServerConfig, NO_JUDGE),
    "mcqa": (choices.MCQAResourcesServer, choices.MCQAResourcesServerConfig, {}),
    "structured_outputs": (
        schemas.StructuredOutputsResourcesServer,
        schemas.StructuredOutputsResourcesServerConfig,
        {},
    ),
}


def client(name: str) -> TestClient:
    server, config, settings = SERVERS[name]
    made = config(host="0.0.0.0", port=8080, entrypoint="", name=name, **settings)
    return TestClient(server(config=made, server_client=MagicMock(spec=ServerClient)).setup_webserver())


def main() -> None:
    clients = {name: client(name) for name in SERVERS}
    for line in sys.stdin:
        name, answer, row = json.loads(line)
        content = [{"type": "output_text", "text": answer, "annotations": []}]
        message = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": content}
        response = {
            **{"id": "r", "created_at": 0.0, "model": "m", "object": "response", "output": [message]},
            **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": []},
        }
        asked = {"responses_create_params": {"input": [{"role": "user", "content": "?"}]}, "response": response}
        reply = clients[name].post("/verify", json=row | asked)
        print(reply.json()["reward"] if reply.status_code == 200 else f"failed: {reply.text}", flush=True)


if __name__ == "__main__":
    main()
