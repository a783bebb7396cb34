"""Every option of every method acts, or is refused by a sentence that names what leaves it without effect."""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest
import torch

from edmdistill.defaults import defaults
from edmdistill.draws import Draws
from edmdistill.methods import METHODS
from edmdistill.methods.base import Method, NoiseRange

Make = Callable[..., Any]
FILES = {"features", "lpips"}
"""Options that name files; `distance = "lpips"` goes with the second."""
LISTS: dict[str, list[Any]] = {
    "levels": [[2.5], [10.0, 1.0]],
    "guidance": [[1.0, 3.0], [2.0, 2.0]],
    "gan_augment": [["color"], []],
    "gan_penalty": [0.7],
    "P_mean_s": [-2.0],
    "P_std_s": [0.5],
    "augmentations": [["yflip", "scale"]],
    "N": [6, 9],
}
TIGHTER = {"imm": {"k", "min_gap"}, "ect": {"q"}}
"""Options that set a limit, which does not act where another limit is tighter."""
SMALL: dict[str, dict[str, Any]] = {"ctm": {"N": 5, "max_steps": 3, "gan_channels": 4}}
"""Options of methods whose defaults are slow."""
ROWS = 16


def others(method: str, name: str, default: Any, hint: Any) -> list[Any]:
    """Values of an option other than its default."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if name == "intervals" and method == "ect":
        return [[10, 1280]]
    if name in LISTS:
        return LISTS[name]
    if get_origin(hint) is Literal:
        return [value for value in get_args(hint) if value not in (default, "lpips")]
    if isinstance(default, bool):
        return [not default]
    numbers = [0, 2, 8] if isinstance(default, int) else [0.0, 0.5, 1.3, default * 0.7 + 0.1]
    return [value for value in numbers if value != default]


def effects(method: type[Method], config: Any, networks: Make, batch: Make, noise: NoiseRange) -> list[Any]:
    """All that options decide: roles, turns, and losses early and late in a run."""
    roles = method.roles_for(config)
    players = networks(method, **msgspec.to_builtins(config))
    made = method(config, players, noise)
    teacher = method.check_teacher(config, positional_time=False, label_dim=3, label_dropout=0.0)
    found = [method.group_size(config), method.guidance(config), method.schedule(config, noise), teacher]
    found += [(name, role._replace(make=None)) for name, role in roles.items()]
    for turn in made.turns():
        found += [turn.role, turn.begins, turn.preview is None]
    for turn in {turn.role: turn for turn in made.turns()}.values():
        for images in (0, 10**8):
            value = turn.whole(batch(ROWS)._replace(images=images), Draws(3, ROWS)).value
            slopes = torch.autograd.grad(value.sum(), [*players[turn.role].parameters()], allow_unused=True)
            found += [f"{float(part.abs().sum()):.9e}" for part in (value.detach(), *slopes) if part is not None]
    return found


@pytest.fixture
def effect(tiny_networks: Make, tiny_batch: Make, noise: NoiseRange) -> Callable[..., list[Any] | str]:
    """(method, options) -> what they decide, or the sentence that refuses them."""

    def of(method: type[Method], options: dict[str, Any]) -> Any:
        config = read(method, options)
        return config if isinstance(config, str) else effects(method, config, tiny_networks, tiny_batch, noise)

    return of


def read(method: type[Method], options: dict[str, Any]) -> msgspec.Struct | str:
    try:
        return msgspec.convert(options, method.Config)
    except msgspec.ValidationError as refusal:
        return str(refusal)


def idle(name: str, bases: list[dict[str, Any]], effect: Callable[..., Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Options of which no other value acts, none is refused, beside some others."""
    method = METHODS[name].load()
    hints = get_type_hints(method.Config, include_extras=True)
    options = {
        option: [
            value
            for value in others(name, option, default, hints[option])
            if "at `$" not in str(read(method, {option: value}))  # in range
        ]
        for option, default in defaults(method.Config).items()
        if option not in FILES
    }
    assert all(options.values())
    alone = [
        {option: value}
        for option, values in options.items()
        for value in (values if isinstance(values[0], str | bool) else values[:1])
    ]
    for base in (SMALL.get(name, {}) | base for base in bases or alone):
        usual = effect(method, base)
        for option in options.keys() - base.keys() - TIGHTER.get(name, set()) if isinstance(usual, list) else ():
            if all(effect(method, base | {option: value}) == usual for value in options[option]):
                yield base, option


@pytest.mark.parametrize("name", METHODS)
def test_every_option_acts_or_is_refused(name: str, effect: Callable[..., Any]):
    assert list(idle(name, [{}], effect)) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", METHODS)
def test_beside_every_value_of_another(name: str, effect: Callable[..., Any]):
    assert list(idle(name, [], effect)) == []
