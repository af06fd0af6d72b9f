"""Reading the files of clips that have passed the checks."""

import abc
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from sam2_jax.data.decode import decode_frame
from sam2_jax.data.files import AnyPath, Files
from sam2_jax.data.headers import Unfit
from sam2_jax.data.sources import Video
from sam2_jax.types import UserError


def decode_file(path: AnyPath, decoder: Callable[[bytes], np.ndarray], video: Video) -> np.ndarray:
    """Read and decode one picture of a clip.

    Raises:
        UserError: it cannot be read or decoded, or has another size than the clip.
    """
    try:
        array = decoder(path.read_bytes())
    except Unfit as error:
        raise UserError(f"{path} {error}") from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be decoded ({error}): copy or extract it again, or remove its clip"
        ) from error
    if array.shape[:2] != (video.height, video.width):
        raise UserError(
            f"{path} is {array.shape[1]} x {array.shape[0]}, but was {video.width} x "
            f"{video.height} when it was checked: do not change data while they are in use"
        )
    return array


def read_file(path: AnyPath) -> bytes:
    """The bytes of a file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): copy or extract it again") from error


class FileSource(abc.ABC):
    """What sources of picture files have in common. They differ in where masks come from."""

    def __init__(self, name: str, clips: Sequence[tuple[Files, Video]], notes: list[str]) -> None:
        """`clips` have passed the checks."""
        self.name, self.notes = name, notes
        self._clips = list(clips)

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._clips)

    def video(self, index: int) -> Video:
        """Name, length and size of a clip."""
        return self._clips[index][1]

    @abc.abstractmethod
    def objects(self, index: int, frame: int) -> tuple[int, ...]:
        """Ids of the objects visible on a frame, ascending.

        Raises:
            UserError: a mask cannot be read or decoded.
        """

    def read(
        self, index: int, frames: Sequence[int], objects: Sequence[int]
    ) -> tuple[UInt8[np.ndarray, "t h w 3"], Bool[np.ndarray, "t o h w"]]:
        """Decode frames, and the masks of some objects, in the order asked for.

        Raises:
            UserError: a file cannot be read or decoded.
        """
        files, video = self._clips[index]
        pixels = np.empty((len(frames), video.height, video.width, 3), np.uint8)
        masks = np.empty((len(frames), len(objects), video.height, video.width), bool)
        for place, t in enumerate(frames):
            path = files.frame_dir / files.frames[t]
            pixels[place] = decode_file(path, decode_frame, video)
            if objects:
                masks[place] = self._masks(index, t, objects)
        return pixels, masks

    def encoded(self, index: int, frame: int) -> bytes:
        """A frame as it is stored.

        Raises:
            UserError: it cannot be read.
        """
        files = self._clips[index][0]
        return read_file(files.frame_dir / files.frames[frame])

    @abc.abstractmethod
    def _masks(self, index: int, frame: int, objects: Sequence[int]) -> Bool[np.ndarray, "o h w"]:
        """Of some objects of a frame, in the order asked for."""
