"""Frames of a video, one each so many seconds, by PyAV (extra ``video``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snipdedup.errors import SnipError
from snipdedup.pictures.decode import Unreadable
from snipdedup.storage.remote import RemotePath

if TYPE_CHECKING:
    from PIL import Image


def require() -> Any:
    """Return PyAV, or say how to install it."""
    try:
        import av
    except ImportError:
        raise SnipError(
            "--every needs PyAV; install it with: pip install 'snipdedup-toolkit[video]'"
        ) from None
    return av


def frames(path: Path, every: float) -> Iterator[tuple[float, Image.Image]]:
    """Yield the time in seconds and the picture, RGB and upright, of frames of a video.

    Of each ``every`` seconds from its begin on it is the first frame. All frames are decoded, on
    one thread. Raises `Unreadable`, after the frames that come before the damage.
    """
    av, wanted = require(), 0
    try:
        source = path.open("rb") if isinstance(path, RemotePath) else str(path)
        with av.open(source) as opened:
            stream = next(iter(opened.streams.video), None)
            if stream is None:
                raise Unreadable("no video: the file has sound or texts only")
            stream.codec_context.thread_count = 1
            begin = None
            for frame in opened.decode(stream):
                if frame.time is None:
                    continue
                begin = frame.time if begin is None else begin
                second = round(frame.time - begin, 3)
                if second < wanted * every:
                    continue
                wanted = int(second / every + 1e-9) + 1
                picture = frame.to_image()
                turned = getattr(frame, "rotation", 0)  # counterclockwise; older PyAV has none
                yield second, picture.rotate(turned, expand=True) if turned else picture
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unreadable(f"damaged: {error}") from None
    if not wanted:
        raise Unreadable("no frame in this video")
