"""Curves for TensorBoard, in a file that is complete after each line of the log, whatever ends the process."""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from utils.files import Appender, Unwritten
from utils.names import printable

PREFIX = "events.out.tfevents."


class EventFile(Appender):
    """A new event file in ``folder``; of those before it readers forget what is at ``purge_step`` and after."""

    def __init__(self, folder: Path, purge_step: int, unwritten: Unwritten):
        before = [int(path.name.removeprefix(PREFIX)[:10]) for path in folder.glob(f"{PREFIX}{'[0-9]' * 10}*")]
        began = max([int(time.time()), *(second + 1 for second in before)])  # they are read in the order of names
        path = folder / f"{PREFIX}{began:010}.{socket.gethostname()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        header = _record(Event(wall_time=time.time(), step=purge_step, file_version="brain.Event:2"))
        super().__init__(
            path, unwritten, header + _record(Event(wall_time=time.time(), step=purge_step, session_log=start))
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each of these curves."""
        self._add(Summary(value=[Summary.Value(tag=name, simple_value=v) for name, v in values.items()]), step)

    def _add(self, summary: Summary, step: int) -> None:
        self.add(_record(Event(wall_time=time.time(), step=step, summary=summary)))

    def text(self, name: str, words: str) -> None:
        """Add a text, which is shown as it is."""
        self._add(summary.text(name, "\n".join(f"    {line}" for line in words.splitlines())), 0)

    def settings(self, values: Mapping[str, Any]) -> None:
        """Tell the settings of the run, which TensorBoard lists beside the last points of its curves."""
        simple = {key: v if isinstance(v, bool | int | float) else printable(str(v)) for key, v in values.items()}
        _, *parts = summary.hparams(simple, {})  # the first tells which settings and curves there are in all runs
        for part in parts:
            self._add(part, 0)

    def pictures(self, pictures: Mapping[str, bytes], step: int) -> None:
        """Add pictures, each a PNG file."""
        images = {name: Summary.Image(encoded_image_string=data) for name, data in pictures.items()}
        self._add(Summary(value=[Summary.Value(tag=name, image=image) for name, image in images.items()]), step)


def _record(event: Event) -> bytes:
    file = io.BytesIO()
    RecordWriter(file).write(event.SerializeToString())
    return file.getvalue()
