"""Numbers of bytes, the same for every option that takes one."""

import pytest

from undula.cli.sizes import bytes_of

SIZES = {
    "2GB": 2 * 10**9, "1.5 gib": 3 * 2**29, "500m": 5 * 10**8, "64MiB": 2**26, "1000": 1000, "2kb": 2000,
    "2e9": 2 * 10**9, "1.5MiB": 1_572_864, "1t": 10**12, "1.5e1 k": 15_000,
}  # fmt: skip


@pytest.mark.parametrize("text", SIZES)
def test_sizes_are_read_as_people_write_them(text):
    assert bytes_of(text, "--memory") == SIZES[text]


@pytest.mark.parametrize("text", ["", "GB", "2XB", "-1GB", "0", "1e-9", "1e400", "2 GB of it", "i", "1.2.3", "0.1"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="--memory is a number of bytes"):
        bytes_of(text, "--memory")
