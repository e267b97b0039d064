"""Who starts from weights, or evaluates some, follows them in what nobody has asked for: model and preparation."""

import glob
import os
from collections.abc import Callable
from pathlib import Path

from config import Config, output_dir, settings_in
from models.pretrained import locate
from models.weights import variant_of
from tasks.trained import describe_following, followed, settings_of
from utils import checkpoint
from utils.bar import bar
from utils.distributed import agreement, from_main, is_main
from utils.errors import UserError
from utils.settings import Given


def follow_weights(config: Config, rebuild: Callable[[list[Given]], Config]) -> Config:
    """Build the config anew where weights say more of it than the user did. A collective; rank 0 reads them.

    Args:
        config: what the user has asked for, MODEL.PRETRAINED or MODEL.RESUME with it. Where it names neither of them
            and no model, a run of this TAG that has begun from weights is followed.
        rebuild: makes a config in which the settings that it is given come before all that the user gave.

    Raises:
        UserError: the weights are not there, or say nonsense.
    """
    given: list[Given] = []
    with agreement():
        if is_main():
            bar.doing("looking at the weights")
            given = settings_to_follow(config, config.MODEL.PRETRAINED or config.MODEL.RESUME)
    given = from_main(given)
    if not given:
        return config
    with agreement():
        config = rebuild(given)
    vars(config)["notes"] = (*config.notes, *describe_following(config, given))
    return config


def settings_to_follow(config: Config, source: str) -> list[Given]:
    """Read what a run follows: weights, or the run itself where it has begun and the weights are gone or not named."""
    if not source:
        begun = [] if "MODEL.NAME" in config.given or output_dir(config).is_dir() else runs_begun(config, None)
        return settings_of_run(config, begun[0]) if len(begun) == 1 else []
    name = config.MODEL.NAME if "MODEL.NAME" in config.given else ""
    try:
        path = locate(source, config.MODEL.NAME)
        content = checkpoint.read(path)
    except UserError:
        begun = runs_begun(config, source)
        if len(begun) != 1:
            raise
        return settings_of_run(config, begun[0])
    weights = checkpoint.state_dict_of(content, path)
    says = isinstance(content.get("config"), str) or os.path.isdir(path) or name or variant_of(weights)
    if not says:  # if they do not fit the default model, that will be said
        return []
    return followed(config, settings_of(content, weights, path, name))


def runs_begun(config: Config, source: str | None) -> list[Path]:
    """Find the configs of runs with this TAG that began from these weights, or from any."""
    own = output_dir(config) / "config.yaml"
    of_tag = Path(config.OUTPUT).glob(f"*/{glob.escape(config.TAG)}/config.yaml")
    return [path for path in ([own] if "MODEL.NAME" in config.given else of_tag) if began_from(path, source)]


def began_from(file: Path, source: str | None) -> bool:
    """Tell whether a run's config says that it began from these weights, or from any."""
    try:
        there = settings_in(file.read_text(encoding="utf-8"), str(file)).get("MODEL.PRETRAINED")
    except (OSError, UnicodeDecodeError, UserError):
        return False
    return bool(there) if source is None else there == source


def settings_of_run(config: Config, file: Path) -> list[Given]:
    """What a begun run follows: its own config."""
    there = settings_in(file.read_text(encoding="utf-8"), str(file))
    return followed(config, [(key, value, str(file)) for key, value in there.items()])
