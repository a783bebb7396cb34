"""The pickle machine: what it refuses, and that no file takes the memory, the time or the process."""

import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edmdistill.pickles import MAX_STEPS, StandIn, Unpickler, Unreadable

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CALLS: list[tuple[object, ...]] = []
NAMES = {("a", "f"): StandIn(lambda *arguments: CALLS.append(arguments)), ("a", "marker"): None}


def run(program: bytes) -> object:
    return Unpickler(memoryview(program), NAMES).run()


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner) | st.sets(st.text()),
    max_leaves=20,
)


@unhurried
@given(json_like, st.sampled_from((2, 3, 4, 5)))
def test_agrees_with_pickle(value: object, protocol: int) -> None:
    """What Python pickles of plain values reads back the same, or (as sets before protocol 4) is refused."""
    program = pickle.dumps(value, protocol)
    try:
        assert run(program) == value
    except Unreadable:
        assert protocol < 4


@unhurried
@given(st.binary(max_size=200))
def test_random_bytes_only_raise_unreadable(program: bytes) -> None:
    CALLS.clear()
    try:
        run(program)
    except Unreadable:
        assert not CALLS


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"cos\nsystem\n(S'x'\ntR.", "'os.system'"),
        (b"\x80\x04\x8c\x01a\x8c\x03f.g\x93.", "'a.f.g'"),
        (b"\x80\x04\x8c\x0btorch_utils\x8c\x01x\x93.", "PyPI"),
        (b"\x80\x04\x8c\x01a\x8c\x01f\x93", "ends too early"),
        (b"\x80\x04B\xff\xff\xff\xff.", "ends too early"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "ends too early"),
        (b"c" + b"a" * 1000, "damaged"),
        (b"K\x01K\x02\x81.", "damaged"),
        (b"]K\x01b.", "damaged"),
        (b"0.", "damaged"),
        (b".", "damaged"),
        (b"h\x00.", "damaged"),
        (b"K\x01Q.", "damaged"),
        (b"(S'touch PWNED'\nios\nsystem\n.", "damaged"),
    ],
)
def test_refused(program: bytes, why: str) -> None:
    with pytest.raises(Unreadable, match=why):
        run(program)


@pytest.mark.parametrize("before_after", [(b"}", b"K\x01s."), (b"\x8f(", b"\x90.")])
def test_keys_are_flat(before_after: tuple[bytes, bytes]) -> None:
    """A deep tuple as a key, or in a set, would be hashed by recursion in C and end the process."""
    before, after = before_after
    with pytest.raises(Unreadable, match="damaged"):
        run(before + b")" + b"\x85" * 200_000 + after)


def test_instructions_are_limited() -> None:
    with pytest.raises(Unreadable, match=f"{MAX_STEPS:,}"):
        run(b"K\x01" * MAX_STEPS)


def test_memo_index_costs_nothing() -> None:
    """Python's unpickler makes a table of 2^32 entries for this."""
    assert run(b"\x88r\xff\xff\xff\xff.") is True
