"""The pickle machine: what it refuses, and that no file takes the memory, the time or the process."""

import pickle
from contextlib import suppress

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


INSTRUCTIONS = [
    *(b"N", b"\x88", b"K\x01", b"\x8c\x01a", b"\x8c\x01f", b"C\x01x", b"ca\nf\n", b"ca\nmarker\n"),
    *(b")", b"\x85", b"\x86", b"\x87", b"(", b"t", b"]", b"}", b"\x8f", b"\x94", b"h\0", b"0"),
    *(b"\x93", b"R", b"\x81", b"Q", b"a", b"e", b"s", b"u", b"\x90", b"b"),
]


@unhurried
@given(st.lists(st.sampled_from(INSTRUCTIONS), max_size=12))
def test_instructions_in_any_order_only_raise_unreadable(program: list[bytes]) -> None:
    with suppress(Unreadable):
        run(b"".join(program) + b".")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (b"cos\nsystem\n(S'x'\ntR.", "'os.system'"),
        (b"\x80\x04\x8c\x01a\x8c\x03f.g\x93.", "'a.f.g'"),
        (b"\x80\x04\x8c\x0btorch_utils\x8c\x01x\x93.", "PyPI"),
        (b"\x80\x04\x8c\x01a\x8c\x01f\x93", "ends too early"),
        (b"\x80\x04B\xff\xff\xff\xff.", "ends too early"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "ends too early"),
        (b"\x80\x04\x8c\x02os\x8c\x01f\x93.", "'os.f'"),  # known of another module
        (b"c" + b"a" * 1000, "damaged"),
        (b"c" + b"a" * 300 + b"\nf\n.", "damaged"),
        (b"K\x01K\x02\x81.", "damaged"),
        (b"]K\x01b.", "damaged"),
        (b"0.", "damaged"),
        (b".", "damaged"),
        (b"h\x00.", "damaged"),
        (b"K\x01Q.", "damaged"),
        (b"(S'touch PWNED'\nios\nsystem\n.", "damaged"),
        (b"K\x01K\x02\x93.", "damaged"),
        (b"K\x01K\x02\x87.", "damaged"),
        (b"ca\nf\n]R.", "damaged"),
        (b"j\0\0\0\0.", "damaged"),
        (b"}K\x01a.", "damaged"),
        (b"](\x8c\x01a\x90.", "damaged"),
        (b"\x8f\x8c\x01aK\x01s.", "damaged"),
        (b"}(\x8c\x01au.", "damaged"),
    ],
)
def test_refused(program: bytes, why: str) -> None:
    CALLS.clear()
    with pytest.raises(Unreadable, match=why):
        run(program)
    assert not CALLS


@pytest.mark.parametrize("before_after", [(b"}", b"K\x01s."), (b"\x8f(", b"\x90.")])
def test_keys_are_flat(before_after: tuple[bytes, bytes]) -> None:
    """A deep tuple as a key, or in a set, would be hashed by recursion in C and end the process."""
    before, after = before_after
    with pytest.raises(Unreadable, match="damaged"):
        run(before + b")" + b"\x85" * 200_000 + after)


@pytest.mark.parametrize("key", [b"\x88", b"J\xff\xff\xff\xff", b"\x8a\x05\0\0\0\x80\0", b"N"])
def test_numbers_as_keys_are_small(key: bytes) -> None:
    """Where they may be keys at all, as of hooks: large ones could be chosen to collide, and True is 1."""
    with pytest.raises(Unreadable, match="damaged"):
        Unpickler(memoryview(b"}" + key + b"K\x01s."), {}, keys=(str, int)).run()
    assert Unpickler(memoryview(b"}J\xff\xff\xff\x7fK\x01s."), {}, keys=(str, int)).run() == {2**31 - 1: 1}


@pytest.mark.parametrize(("first", "second"), [(b"K\x01\x94.", b"h\0."), (b"(K\x01.", b"t."), (b"K\x01K\x02.", b".")])
def test_a_pickle_starts_from_nothing(first: bytes, second: bytes) -> None:
    """Whatever memo, marks or values the one before it in the file has left."""
    machine = Unpickler(memoryview(first + second), {})
    machine.run()
    with pytest.raises(Unreadable, match="damaged"):
        machine.run()


def test_strings_of_python_2() -> None:
    program = b"\x80\x02U\x02\xe9a."
    assert run(program) == pickle.loads(program, encoding="latin-1") == "\xe9a"


def test_instructions_are_limited() -> None:
    with pytest.raises(Unreadable, match=f"{MAX_STEPS:,}"):
        run(b"K\x01" * MAX_STEPS)


def test_memo_index_costs_nothing() -> None:
    """Python's unpickler makes a table of 2^32 entries for this."""
    assert run(b"\x88r\xff\xff\xff\xff.") is True
