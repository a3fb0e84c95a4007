"""One engine behind an address: OpenAI's HTTP interface, keys, metrics and a page to look at."""
