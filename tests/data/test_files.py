"""Roots in the cloud, folders that cannot be listed, and names that are no frame numbers."""

import pickle
import shutil

import fsspec
import numpy as np
import pytest
from etils.epath import gpath

from sam2_jax.data.folders import open_folder
from sam2_jax.types import UserError


def names(source):
    return [source.video(i).name for i in range(len(source))]


def test_folder_that_cannot_be_listed(flat, monkeypatch):
    real = type(flat).iterdir

    def iterdir(path):
        if path.name == "bee":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(type(flat), "iterdir", iterdir)
    with pytest.raises(UserError, match="JPEGImages/bee cannot be read .*Permission denied"):
        open_folder(str(flat), "train")


def test_numbers_that_are_no_frame_numbers_have_no_gaps(flat):
    for name, folder in ((".jpg", "JPEGImages"), (".png", "Annotations")):
        for t, number in enumerate((1, 5, 6, 20, 33, 34)):
            (flat / folder / f"bee/{t:05d}{name}").rename(flat / folder / f"bee/x{number}{name}")
        for path in (flat / folder / "bee").iterdir():
            path.rename(path.with_name(path.name[1:]))
    assert open_folder(str(flat), "train").video(1).num_frames == 6


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs:// and s3:// that end in a local folder, by the road that etils takes."""

    class Bucket(fsspec.get_filesystem_class("file")):
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            path = str(path).removeprefix("gs://bucket").removeprefix("s3://bucket")
            return super()._strip_protocol(
                path if path.startswith(str(tmp_path)) else f"{tmp_path}{path}"
            )

    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    backend = type(gpath.backend_lib.fsspec_backend)
    monkeypatch.setattr(backend, "_get_filesystem", lambda self, name: Bucket())


@pytest.mark.parametrize("cloud", ["gs", "s3"])
def test_clouds(flat, bucket, cloud):
    source = open_folder(f"{cloud}://bucket/flat", "train")
    local = open_folder(str(flat), "train")
    assert source.name == f"{cloud}://bucket/flat" and names(source) == names(local)
    for there, here in zip(source.read(1, [3], [1]), local.read(1, [3], [1]), strict=True):
        np.testing.assert_array_equal(there, here)
    assert pickle.loads(pickle.dumps(source)).objects(0, 5) == (1, 2)
    shutil.rmtree(flat / "Annotations/bee")
    with pytest.raises(UserError, match=f"no masks: {cloud}://bucket/flat/Annotations/bee"):
        open_folder(f"{cloud}://bucket/flat", "train")
    with pytest.raises(UserError, match="gs://bucket/none is no folder"):
        open_folder("gs://bucket/none", "train")


@pytest.mark.parametrize("cloud, package", [("gs", "gcsfs"), ("s3", "s3fs")])
def test_clouds_say_which_package_they_need(monkeypatch, cloud, package):
    def missing(self, name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(type(gpath.backend_lib.fsspec_backend), "_get_filesystem", missing)
    with pytest.raises(UserError, match=f"{cloud}://b/c needs a package: pip install {package}"):
        open_folder(f"{cloud}://b/c", "train")
    with pytest.raises(UserError, match="ftp://b is of no kind that can be read"):
        open_folder("ftp://b", "train")
