"""Sixteen tools of the shapes that coding agents offer: nested objects, enums, patterns, unions, definitions, formats."""

from typing import Any

TEXT: dict[str, Any] = {"type": "string"}
FLAG: dict[str, Any] = {"type": "boolean"}
ID: dict[str, Any] = {"type": "string", "pattern": "^[a-z]{2,8}_[0-9]{1,4}$"}
PATH: dict[str, Any] = {"type": "string", "description": "An absolute path, beginning with a slash"}


def tool(called: str, about: str, required: list[str], /, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": called, "description": about, "parameters": parameters}}


_LONG = "Prefer this over a shell command, because its result is numbered and cut to a sensible length. " * 12

TOOLS: list[dict[str, Any]] = [
    tool(
        "read_file",
        _LONG,
        ["path"],
        path=PATH,
        offset={"type": "integer", "minimum": 1},
        limit={"type": "integer", "maximum": 5000},
    ),
    tool("write_file", "Replaces a file's content.", ["path", "content"], path=PATH, content=TEXT),
    tool(
        "edit_file",
        "Replaces one text by another.",
        ["path", "old", "new"],
        path=PATH,
        old=TEXT,
        new=TEXT,
        all={"type": "boolean", "default": False},
    ),
    tool(
        "edit_many",
        "Several replacements in one file, in order.",
        ["path", "edits"],
        path=PATH,
        edits={
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {"old": TEXT, "new": TEXT, "all": FLAG},
                "required": ["old", "new"],
                "additionalProperties": False,
            },
        },
    ),
    tool(
        "run_command",
        _LONG,
        ["command"],
        command=TEXT,
        timeout={"type": "integer", "minimum": 1, "maximum": 600000},
        background=FLAG,
        description={"type": "string", "maxLength": 80},
    ),
    tool(
        "command_output",
        "What a background command has printed.",
        ["id"],
        id=ID,
        filter=TEXT,
    ),
    tool("stop_command", "Ends a background command.", ["id"], id=ID),
    tool("find_files", "Files whose path matches a pattern.", ["pattern"], pattern=TEXT, path=PATH),
    tool(
        "search",
        _LONG,
        ["pattern"],
        pattern=TEXT,
        path=PATH,
        mode={"enum": ["content", "files", "count"]},
        type={"enum": ["py", "js", "ts", "rust", "go", "java", "c", "cpp", "md"]},
        before={"type": "integer", "minimum": 0},
        after={"type": "integer", "minimum": 0},
        multiline=FLAG,
        ignore_case=FLAG,
        limit={"anyOf": [{"type": "integer"}, {"type": "null"}]},
    ),
    tool("list_directory", "What is in a directory.", ["path"], path=PATH, ignore={"type": "array", "items": TEXT}),
    tool(
        "fetch_page", "A web page as text.", ["url", "question"], url={"type": "string", "format": "uri"}, question=TEXT
    ),
    tool(
        "search_web",
        "Searches the web.",
        ["query"],
        query={"type": "string", "minLength": 2},
        allowed={"type": "array", "items": {"type": "string", "format": "hostname"}},
        since={"type": "string", "format": "date"},
    ),
    {
        "type": "function",
        "function": {
            "name": "plan_work",
            "description": "The list of what is to be done, replaced as a whole.",
            "parameters": {
                "$defs": {
                    "status": {"enum": ["pending", "in_progress", "completed"]},
                    "item": {
                        "type": "object",
                        "properties": {
                            "content": {"type": "string", "minLength": 1},
                            "status": {"$ref": "#/$defs/status"},
                        },
                        "required": ["content", "status"],
                        "additionalProperties": False,
                    },
                },
                "type": "object",
                "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1}},
                "required": ["items"],
                "additionalProperties": False,
            },
        },
    },
    tool(
        "delegate",
        _LONG,
        ["description", "prompt", "kind"],
        description={"type": "string", "maxLength": 60},
        prompt=TEXT,
        kind={"enum": ["general", "explore", "review"]},
    ),
    tool(
        "edit_notebook",
        "Changes a cell.",
        ["path", "source"],
        path=PATH,
        source=TEXT,
        cell={"anyOf": [{"type": "string"}, {"type": "integer"}]},
        kind={"enum": ["code", "markdown"]},
        mode={"enum": ["replace", "insert", "delete"]},
    ),
    tool("finish_plan", "Shows the plan to the user.", ["plan"], plan=TEXT),
]

assert len(TOOLS) == 16
