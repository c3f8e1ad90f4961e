"""What is kept: files written whole, work that goes on where it was stopped, one process at a time, digests."""

from .digests import digest_of, file_digest, json_digest, model_digest
from .files import (
    PARTIAL,
    NotKept,
    check_finite,
    is_finite,
    json_text,
    not_kept,
    replacing,
    write_bytes,
    write_tensors,
    write_text,
)
from .lock import LOCK, InUse, locked
from .work import Resumable

__all__ = [
    "LOCK",
    "PARTIAL",
    "InUse",
    "NotKept",
    "Resumable",
    "check_finite",
    "digest_of",
    "file_digest",
    "is_finite",
    "json_digest",
    "json_text",
    "locked",
    "model_digest",
    "not_kept",
    "replacing",
    "write_bytes",
    "write_tensors",
    "write_text",
]
