"""Whether an answer is what a JSON Schema asks for, and nothing else. As NeMo-Gym's structured_outputs, for JSON, YAML
and TOML: every property of the schema is required, and no other allowed.
"""

import functools
import json
import tomllib
from typing import Any

import jsonschema
import yaml

_READERS = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}


def verify(answer: str, row: dict) -> float:
    """1.0 when the whole answer reads as the row's `schema_type` (json) and suits `schema_str`, else 0.0."""
    read = _READERS.get(row.get("schema_type") or "json")
    if read is None:
        raise ValueError(f"schema_type: {row['schema_type']!r} is none of {', '.join(_READERS)}")
    schema = _validator(row["schema_str"])
    if not answer.strip():
        return 0.0
    try:
        return float(schema.is_valid(read(answer)))
    except (ValueError, RecursionError, yaml.YAMLError):
        return 0.0


@functools.lru_cache(maxsize=10_000)
def _validator(text: str) -> jsonschema.Draft202012Validator:
    schema = json.loads(text)
    _strict(schema)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def _strict(schema: Any) -> None:
    if isinstance(schema, dict):
        if "properties" in schema:
            schema["required"] = list(schema["properties"])
            schema["additionalProperties"] = False
        for part in schema.values():
            _strict(part)
