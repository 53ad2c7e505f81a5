"""Damaged and forged files: whatever is in them, reading ends in a result or in one ValueError."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, -1, 1, 2**31, 2**32, 2**63, 10**6, 1e308, 0.5]),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.sampled_from(["../../outside", "/etc/passwd", "a" * 300, "", "\0", "s3://x/y", "builtins.eval", "os.system"]),
    st.lists(st.integers(-5, 5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.builds(lambda: [[[[[[]]]]]]),
)


def paths(value: Any, prefix: tuple = ()) -> list[tuple]:
    """Path to each value in nested dicts and lists."""
    found = [prefix]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        found += paths(entry, (*prefix, key))
    return found


@st.composite
def forged(draw, value: Any) -> Any:
    """The value with one to three of its entries replaced or removed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(value)))
        if not path:
            return draw(VALUES)
        node = value
        for key in path[:-1]:
            node = node[key]
        if draw(st.booleans()) or isinstance(node, list):
            node[path[-1]] = draw(VALUES)
        else:
            del node[path[-1]]
    return value


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes with up to eight changed, and perhaps cut or extended."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(0, 8))):
        changed[draw(st.integers(0, min(len(changed), 4000) - 1))] = draw(st.integers(0, 255))
    end = draw(st.sampled_from([None, 0, 1, 10, len(content) // 2, len(content) - 1]))
    return bytes(changed[:end]) + draw(st.binary(max_size=3))


def write(file: Path, value: Any) -> None:
    """JSON, also of values that strict JSON does not have."""
    file.write_text(json.dumps(value), encoding="utf-8")


def is_read_or_refused(read: Callable[[], Any], file: Path) -> bool:
    """Whether reading returns, or raises a ValueError (or OSError) in one line that names the file's folder."""
    try:
        read()
    except (ValueError, OSError) as error:
        assert str(file.parent) in str(error) or file.name in str(error), error
        assert len(str(error).splitlines()) == 1, error
    return True
