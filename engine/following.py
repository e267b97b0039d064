"""Who starts from weights, or evaluates some, follows them in what nobody has asked for: model and preparation."""

import os
from collections.abc import Callable
from pathlib import Path

from config import Config, settings_in
from models.pretrained import locate
from models.weights import variant_of
from tasks.trained import describe_following, followed, settings_of
from utils import checkpoint
from utils.distributed import agreement, from_main, is_main
from utils.errors import UserError
from utils.settings import Given


def follow_weights(config: Config, rebuild: Callable[[list[Given]], Config]) -> Config:
    """Build the config anew where weights say more of it than the user did. A collective; rank 0 reads them.

    Args:
        config: what the user has asked for, MODEL.PRETRAINED or, to evaluate it, MODEL.RESUME with it.
        rebuild: makes a config in which the settings that it is given come before all that the user gave.

    Raises:
        UserError: the weights are not there, or say nonsense.
    """
    source = config.MODEL.PRETRAINED or config.MODEL.RESUME
    if not source:
        return config
    given: list[Given] = []
    with agreement():
        if is_main():
            given = settings_to_follow(config, source)
    given = from_main(given)
    config = rebuild(given)
    if given and (line := describe_following(config, given[0][2])):
        vars(config)["notes"] = (*config.notes, line)
    return config


def settings_to_follow(config: Config, source: str) -> list[Given]:
    """Read what a run follows: of the weights, or of the run itself where it has begun and the weights are gone."""
    name = config.MODEL.NAME if "MODEL.NAME" in config.given else ""
    try:
        path = locate(source, config.MODEL.NAME)
        content = checkpoint.read(path)
    except UserError:
        begun = [file for file in Path(config.OUTPUT).glob(f"*/{config.TAG}/config.yaml") if began_from(file, source)]
        if len(begun) != 1:
            raise
        there = settings_in(begun[0].read_text(encoding="utf-8"), str(begun[0]))
        return followed(config, [(key, value, str(begun[0])) for key, value in there.items()], str(begun[0]))
    weights = checkpoint.state_dict_of(content, path)
    says = isinstance(content.get("config"), str) or os.path.isdir(path) or name or variant_of(weights)
    if not says:  # if they do not fit the default model, that will be said
        return []
    return followed(config, settings_of(content, weights, path, name), path)


def began_from(file: Path, source: str) -> bool:
    """Tell whether a run's config says that it began from these weights."""
    try:
        return settings_in(file.read_text(encoding="utf-8"), str(file)).get("MODEL.PRETRAINED") == source
    except (OSError, UnicodeDecodeError, UserError):
        return False
