"""Cut a dataset into samples of equal length: documents one after another, no token lost, none read twice.

In each epoch the documents stand in a new order, joined to one stream; the stream is cut into windows of equal length,
and the windows are shuffled too, so that the chapters of one book do not meet in one batch. Sample k is a pure function
of (seed, k). The last window of an epoch is filled up with targets that count for nothing.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from plait.data.shards import Dataset
from plait.data.shuffle import key_of, permutation

IGNORED = -100
"""Target of a position that predicts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Epoch:
    documents: np.ndarray
    """Documents in the order of the stream."""
    ends: np.ndarray
    """Where each of them ends in the stream."""
    windows: np.ndarray
    """Windows in the order of the samples."""


class Packing:
    """Samples of one dataset."""

    def __init__(self, dataset: Dataset, seq_len: int, *, seed: int, name: str = "") -> None:
        """
        Args:
            dataset: where documents come from.
            seq_len: tokens in a sample.
            seed, name: give the order; two datasets of one run have different names.

        Raises: ValueError for an empty dataset or a length below 1.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len = {seq_len}; give at least 1 token")
        if not dataset.n_tokens:
            raise ValueError(f"{dataset.folder} holds no tokens; write it anew from files that hold text")
        self.dataset = dataset
        self.seq_len = seq_len
        self.n_samples: int = -(-dataset.n_tokens // seq_len)
        """Samples in one epoch."""
        self._key = (seed, name)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._lock = threading.Lock()

    def fill(self, sample: int, ids: np.ndarray, targets: np.ndarray, starts: np.ndarray) -> None:
        """Write sample number `sample` (any number from 0; n_samples of them are an epoch) into three rows.

        Args:
            ids: (seq_len,) int64, receives the tokens.
            targets: (seq_len,) int64, receives the token that follows each, IGNORED after a document's last.
            starts: (seq_len,) bool, receives True at the first position and at each document's first token.
        """
        number, place = divmod(sample, self.n_samples)
        epoch = self._epoch(number)
        begin = int(epoch.windows[place]) * self.seq_len
        # one token more than the row holds: the last position has a target too
        tokens = np.empty(self.seq_len + 1, np.int64)
        first = last = int(np.searchsorted(epoch.ends, begin, side="right"))
        filled = 0
        skip = begin - (int(epoch.ends[first - 1]) if first else 0)
        while filled <= self.seq_len and last < len(epoch.ends):
            piece = self.dataset.document(int(epoch.documents[last]))[skip : skip + self.seq_len + 1 - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            last, skip = last + 1, 0
        # behind the last token of an epoch stands its end-of-text mark, over and over
        tokens[filled:] = tokens[filled - 1]
        ids[:] = tokens[:-1]
        targets[:] = tokens[1:]
        targets[filled:] = IGNORED
        starts[:] = False
        starts[0] = True
        ends = epoch.ends[first:last] - begin
        targets[ends[ends <= self.seq_len] - 1] = IGNORED
        starts[ends[ends < self.seq_len]] = True

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._epochs:
                documents = permutation(self.dataset.n_documents, key_of("documents", *self._key, number))
                self._epochs[number] = _Epoch(
                    documents=documents,
                    ends=np.cumsum(self.dataset.lengths[documents]),
                    windows=permutation(self.n_samples, key_of("windows", *self._key, number)),
                )
                # a batch at the turn of an epoch needs both; older ones are not met again
                while len(self._epochs) > 2:
                    self._epochs.popitem(last=False)
            return self._epochs[number]
