"""Arrays of Orbax at s3://, which several processes of a run write and read together.

Orbax writes its other files wherever `epath` can, but arrays to gs:// and to disks alone. One function of Orbax tells
TensorStore where an array is: `build_kvstore_tspec`. It refuses s3://, for which TensorStore has a driver. Here it
answers for s3:// as for gs://, with that driver in place of the other one. The function is not a public one, so its
answer for gs:// is compared with the one of Orbax 0.12.8 first.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint._src.serialization import tensorstore_utils

from sgpo_jax.runtime import buckets

_AMAZON = re.compile(r"https://s3(\.[\w-]+)?\.amazonaws\.com")  # where every bucket has a region of its own
_places: dict[str, dict[str, Any]] = {}  # bucket -> its place, as TensorStore names it


def allow(url: str) -> None:
    """Lets Orbax, in this process, write and read arrays below an s3:// URL, after writing an object there.

    Raises:
      ValueError: this release of Orbax has another such function, or TensorStore cannot write there.
      OSError: the bucket cannot be reached.
    """
    bucket, _, folder = url.removeprefix("s3://").partition("/")
    if not _places:
        build = tensorstore_utils.build_kvstore_tspec
        if not _is_known(build):
            raise ValueError(
                f"--workdir={url}: orbax-checkpoint {ocp.__version__} names the place of an array in another way than "
                "0.12.8, so several processes cannot write a checkpoint there; must be at gs://, or a folder that all "
                "processes share"
            )
        tensorstore_utils.build_kvstore_tspec = _with_s3(build)
    _places[bucket] = _place(bucket)
    try:
        store = tensorstore.KvStore.open(_places[bucket]).result()
        for content in (b"", None):  # the second one deletes it
            store.write(f"{folder}/.probe.{os.getpid()}", content).result()
    except ValueError as error:
        raise ValueError(
            f"--workdir={url}: must be in a bucket that TensorStore can write to, with which several processes write a "
            f"checkpoint ({' '.join(str(error).split())[:300]})"
        ) from error


def _is_known(build: Callable[..., Any]) -> bool:
    """Returns whether Orbax's function gives a place at gs:// as in release 0.12.8."""
    known = {"driver": os.environ.get("TENSORSTORE_GCS_BACKEND", "gcs"), "bucket": "bucket", "path": "run/a"}
    try:
        return build("gs://bucket/run/a")["base"] == known == build("gs://bucket/run", "a", use_ocdbt=False)
    except (TypeError, KeyError):
        return False


def _with_s3(build: Callable[..., Any]) -> Callable[..., Any]:
    def build_kvstore_tspec(directory: str, *args: Any, **more: Any) -> Any:
        if not directory.startswith("s3://"):
            return build(directory, *args, **more)
        path = directory.removeprefix("s3://")
        spec = build(f"gs://{path}", *args, **more)
        spec.get("base", spec).update(_places[path.partition("/")[0]])
        return spec

    return build_kvstore_tspec


def _place(bucket: str) -> dict[str, Any]:
    """Returns the place of a bucket as TensorStore names it: at the server, and in the region, of the client of S3."""
    fs = buckets.client("s3")
    buckets.patiently(fs.connect, f"s3://{bucket}")
    place = {"driver": "s3", "bucket": bucket, "aws_region": fs.s3.meta.region_name}
    if _AMAZON.fullmatch(fs.s3.meta.endpoint_url):
        answer = buckets.patiently(lambda: fs.call_s3("head_bucket", Bucket=bucket), f"s3://{bucket}")
        place["aws_region"] = answer["ResponseMetadata"]["HTTPHeaders"]["x-amz-bucket-region"]
    else:
        place["endpoint"] = fs.s3.meta.endpoint_url.rstrip("/")
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else TensorStore looks for files first, and complains of missing ones
        place["aws_credentials"] = {"type": "environment"}
    return place
