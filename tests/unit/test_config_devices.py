"""Every accepted form of a device mapping, and what is refused."""

from __future__ import annotations

import pytest

from trainer.config.devices import parse_device_mapping


@pytest.mark.parametrize(
    ("value", "ranks"),
    [
        ("0-7", tuple(range(8))),
        ("0,2,5-6", (0, 2, 5, 6)),
        (" 3 ", (3,)),
        ("[0, 1]", (0, 1)),
        ([0, 1], (0, 1)),
        ([4, 2], (4, 2)),
        ("list(range(0,12))", tuple(range(12))),
        ("list(range(4))", (0, 1, 2, 3)),
        ("list( range( 0, 8, 2 ) )", (0, 2, 4, 6)),
        ("range(2,4)", (2, 3)),
    ],
)
def test_accepted(value: str | list[int], ranks: tuple[int, ...]) -> None:
    assert parse_device_mapping(value, "critic.device_mapping") == ranks


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("0,0", "more than once"),
        ("0-3,2", "more than once"),
        ([1, 1], "more than once"),
        ("7-0", "backwards"),
        ("-1", "negative"),
        ("0,-1", "negative"),
        ([0, -2], "negative"),
        ("list(range(-2,2))", "negative"),
        ("", "cannot read"),
        ([], "no device"),
        ("[]", "cannot read"),
        ("0,,1", "cannot read"),
        ("a-b", "cannot read"),
        ("0-1-2", "cannot read"),
        ("list(range(4,0))", "backwards"),
        ("list(range(4,0,-1))", "step"),
        ("list(range(x))", "whole numbers"),
        ("list(range(1,2,3,4))", "whole numbers"),
        ("list(range(2)", "cannot read"),
        ("range(2))", "cannot read"),
        ("__import__('os').getcwd()", "cannot read"),
    ],
)
def test_refused_naming_the_key(value: str | list[int], wrong: str) -> None:
    with pytest.raises(ValueError, match=r"^critic\.device_mapping=") as error:
        parse_device_mapping(value, "critic.device_mapping")
    assert wrong in str(error.value)
    assert "write ranks such as 0-7" in str(error.value)
