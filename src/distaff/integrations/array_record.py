"""ArrayRecord: files of records with random access."""

from __future__ import annotations

from array_record.python import array_record_module  # ty: ignore[import-not-found] no stubs

from distaff.data.formats.files import DataFile
from distaff.errors import DataFileError

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class Records:
    """The records of an open file.

    Raises:
        DataFileError: it is not a whole ArrayRecord file.
    """

    def __init__(self, file: DataFile) -> None:
        self._file = file
        self._reader = array_record_module.ArrayRecordReader(str(file.path), _RANDOM_ACCESS)
        if not self._reader.ok():
            raise DataFileError(
                f"{file.path} ({file.num_bytes:,} bytes) is not a whole ArrayRecord file. Get or "
                "write it again."
            )

    def __len__(self) -> int:
        return self._reader.num_records()

    def read(self, start: int, stop: int) -> list[bytes]:
        """Returns consecutive records.

        Raises:
            DataFileError: they cannot be read.
        """
        try:
            return self._reader.read(start, stop)
        except (IndexError, RuntimeError, ValueError) as error:
            raise DataFileError(
                f"A file must be whole; {self._file.path} is damaged in records {start} to {stop}: "
                f"{error}. Get or write it again."
            ) from error
