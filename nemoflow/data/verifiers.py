"""What NeMo-RL and the verifiers of NeMo-Gym's environments need of a row for RL.

The fields are those that each resources server's request has, read from NeMo-Gym (main, August 2026).
"""

from collections.abc import Callable

_TYPES: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "list": (list,),
    "mapping": (dict,),
    "integer": (int,),
    "any": (object,),
}


def _text(row: dict, *keys: str) -> None:
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key]:
            raise ValueError(f"{key} is missing, or no text")


def _math(row: dict) -> None:
    _text(row, "question", "expected_answer")


def _code(row: dict) -> None:
    metadata = row.get("verifier_metadata")
    tests = metadata.get("unit_tests") if isinstance(metadata, dict) else None
    inputs, outputs = (tests.get("inputs"), tests.get("outputs")) if isinstance(tests, dict) else (None, None)
    if not (isinstance(inputs, list) and isinstance(outputs, list) and inputs and len(inputs) == len(outputs)):
        raise ValueError("verifier_metadata.unit_tests has not as many inputs as outputs, or none")


def _choice(row: dict) -> None:
    metadata = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
    options = row.get("options") or metadata.get("options")
    if not isinstance(options, list) or not options or not all(isinstance(option, dict) for option in options):
        raise ValueError("options is not a list of {letter: text}")
    _text({"expected_answer": row.get("expected_answer") or metadata.get("expected_answer")}, "expected_answer")


def _instructions(row: dict) -> None:
    # Rows of published blends have these at the top; newer ones under verifier_metadata, which then wins.
    metadata = row.get("verifier_metadata") if isinstance(row.get("verifier_metadata"), dict) else {}
    names, arguments, prompt = (metadata.get(key, row.get(key)) for key in ("instruction_id_list", "kwargs", "prompt"))
    if not (isinstance(names, list) and isinstance(arguments, list) and names and len(names) == len(arguments)):
        raise ValueError("instruction_id_list has not as many entries as kwargs, or none")
    _text({"prompt": prompt}, "prompt")
    _number(row, "id")


def _workplace(row: dict) -> None:
    if not isinstance(row.get("ground_truth"), list | str):
        raise ValueError("ground_truth is not a list of calls")
    _text(row, "category", "environment_name")
    _number(row, "id")


def _schema(row: dict) -> None:
    _text(row, "schema_str")


def _number(row: dict, key: str) -> None:
    if isinstance(row.get(key), bool) or not isinstance(row.get(key), int):
        raise ValueError(f"{key} is missing, or no whole number")


VERIFIERS: dict[str, Callable[[dict], None]] = {
    "code_gen": _code,
    "instruction_following": _instructions,
    "math_with_judge": _math,
    "mcqa": _choice,
    "structured_outputs": _schema,
    "workplace_assistant": _workplace,
}
"""NeMo-Gym's resources server -> what its requests must have. Its agents are called SERVER_..._agent."""


def check_row(row: dict) -> None:
    """Raise ValueError with the reason when a row lacks what NeMo-RL or its verifier reads."""
    parameters = row.get("responses_create_params")
    messages = parameters.get("input") if isinstance(parameters, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("responses_create_params.input is not a non-empty list of messages")
    for i, message in enumerate(messages):
        # Items of another type (a tool's call or its output) are the Responses API's own and have no role.
        if not isinstance(message, dict) or (
            message.get("type", "message") == "message"
            and not (isinstance(message.get("role"), str) and isinstance(message.get("content"), str | list))
        ):
            raise ValueError(f"responses_create_params.input[{i}] has no role or no content")
    if not any(message.get("content") for message in messages):
        raise ValueError("responses_create_params.input is empty")
    agent = row.get("agent_ref")
    name = agent.get("name") if isinstance(agent, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError("agent_ref.name is missing")
    for server, check in VERIFIERS.items():
        if name.startswith(f"{server}_"):
            try:
                check(row)
            except ValueError as error:
                raise ValueError(f"{error}; the verifier of {name} reads it") from None


def check_fields(row: dict, fields: dict[str, str], agent: str) -> None:
    """Raise ValueError with the reason when a row lacks a field of its environment.

    fields: key, dotted where it lies deeper, or several with | between of which one is enough -> text, list, mapping,
    integer or any; an empty one is missing.
    """
    for key, wanted in fields.items():
        found = [value for place in key.split("|") if (value := _deep(row, place)) not in (None, "", [], {})]
        if not found:
            raise ValueError(f"{key.replace('|', ' or ')} is missing; the verifier of {agent} reads it")
        if not isinstance(found[0], _TYPES[wanted]) or (wanted == "integer" and isinstance(found[0], bool)):
            raise ValueError(f"{key.replace('|', ' or ')} is no {wanted}; the verifier of {agent} reads it")


def _deep(row: dict, place: str) -> object:
    value: object = row
    for key in place.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
