"""The same search through Qdrant, for sets that outgrow one machine's memory.

Without a server's address the client's embedded mode keeps the collection in a folder on disk: nothing to install
but the package, meant for trying and for small sets (its makers name 20,000 rows). That folder is the client's own
format, which holds pickled Python objects: open only folders you made. A server keeps millions of rows.

Searches are exact in both, so the neighbours are those of :meth:`ReferenceSet.search` on the same rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kept.foreign import one_line
from .reference_set import NEIGHBOURHOOD, Neighbours, ReferenceSet, neighbourhood

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

UPLOAD_ROWS = 256
KEY_VARIABLE = "QDRANT_API_KEY"


class QdrantSearch:
    """A reference set's rows in Qdrant, in a collection named after their fingerprint. Close it after use.

    :meth:`search` and :meth:`similarity` are those of :class:`ReferenceSet`; index is the row's number there too.
    """

    def __init__(
        self,
        reference: ReferenceSet,
        place: str,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Opens ``place`` (a folder, or a server's http address) and uploads the rows it lacks.

        A server's key is read from the environment variable QDRANT_API_KEY. Raises ValueError with a sentence where
        Qdrant cannot be reached or used.
        """
        self.metric = reference.metric
        self.collection = f"dejavu-{reference.fingerprint}"
        self._width = reference.embeddings.shape[1]
        self._check_queries = reference._check_queries
        self._place = place
        with self._spoken():
            self._client = _client(place)
            try:
                self._upload(reference, on_progress)
            except BaseException:
                self._client.close()
                raise

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> QdrantSearch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def search(self, queries: Tensor, k: int) -> Neighbours:
        """The k nearest of each query [B, D]: similarity and index [B, k]."""
        self._check_queries(queries)
        if k < 1:
            raise ValueError(f"the number of neighbours must be at least 1, not {k}")
        if self.metric == "cosine":
            return self._nearest(queries, k)
        found = self._nearest(queries, max(k, NEIGHBOURHOOD))
        return Neighbours(found.similarity[:, :k] / neighbourhood(found.similarity), found.index[:, :k])

    def similarity(self, query: Tensor, index: Tensor) -> Tensor:
        """Similarity [B] of query [B, D] to the rows of index [B], which are fetched; differentiable in the query."""
        self._check_queries(query)
        with self._spoken():
            wanted = [int(number) for number in index]
            points = self._client.retrieve(self.collection, sorted(set(wanted)), with_vectors=True, with_payload=False)
        by_number = {point.id: point.vector for point in points}
        rows = torch.tensor([by_number[number] for number in wanted], dtype=query.dtype, device=query.device)
        if self.metric == "cosine":
            return (query * rows).sum(1)
        denominator = neighbourhood(self._nearest(query, NEIGHBOURHOOD).similarity)[:, 0]
        distances: torch.Tensor = torch.linalg.vector_norm(query - rows, dim=1)
        return -distances / denominator.to(query)

    def _nearest(self, queries: Tensor, k: int) -> Neighbours:
        """Dot products, or negative distances, nearest first; of equals the first row goes first."""
        from qdrant_client import models

        # A server would search by its graph, which is approximate; the embedded mode knows no other way than exactly.
        exact = models.SearchParams(exact=True) if is_address(self._place) else None
        requests = [
            models.QueryRequest(query=row, limit=k, params=exact)
            for row in queries.detach().cpu().float().numpy().tolist()
        ]
        with self._spoken():
            answers = self._client.query_batch_points(self.collection, requests)
        sign = 1 if self.metric == "cosine" else -1
        found = [
            sorted(((sign * p.score, int(p.id)) for p in answer.points), key=lambda f: (-f[0], f[1]))
            for answer in answers
        ]
        return Neighbours(
            torch.tensor([[value for value, _ in row] for row in found], device=queries.device),
            torch.tensor([[number for _, number in row] for row in found], device=queries.device),
        )

    def _upload(self, reference: ReferenceSet, on_progress: Callable[[int, int], None]) -> None:
        """Rows are numbered, and sent in their order: what a stopped upload has sent is not sent again."""
        from qdrant_client import models

        if not self._client.collection_exists(self.collection):
            # Unit rows: their dot product is the cosine, and a row of zeros stays one.
            distance = models.Distance.DOT if self.metric == "cosine" else models.Distance.EUCLID
            self._client.create_collection(self.collection, models.VectorParams(size=self._width, distance=distance))
        total = len(reference)
        for start in range(self._client.count(self.collection, exact=True).count, total, UPLOAD_ROWS):
            numbers = range(start, min(start + UPLOAD_ROWS, total))
            payloads = [
                {
                    "name": reference.names[n],
                    "caption": reference.captions[n],
                    "duplicates": int(reference.duplicates[n]),
                }
                for n in numbers
            ]
            vectors = reference.embeddings[start : numbers.stop].cpu().float().numpy().tolist()
            batch = models.Batch(ids=list(numbers), vectors=vectors, payloads=payloads)
            self._client.upsert(self.collection, batch, wait=True)
            on_progress(numbers.stop, total)

    @contextmanager
    def _spoken(self) -> Iterator[None]:
        """What the client raises becomes a ValueError with a sentence."""
        try:
            yield
        except ImportError as error:
            raise ValueError("searching through Qdrant needs its client: pip install qdrant-client") from error
        except ValueError:
            raise
        except Exception as error:  # the client passes on whatever its transports raise
            raise ValueError(f"Qdrant at {self._place} cannot be used: {one_line(error)}") from error


def is_address(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _client(place: str) -> QdrantClient:
    from qdrant_client import QdrantClient

    if is_address(place):
        return QdrantClient(url=place, api_key=os.environ.get(KEY_VARIABLE), check_compatibility=False)
    folder: Any = Path(place)
    folder.parent.mkdir(parents=True, exist_ok=True)
    return QdrantClient(path=str(folder))
