"""Logs are caught for tests that ask for them.

pytest looks through all loggers, four hundred once transformers is imported, twice in each phase of every test: a tenth
of the time of short ones.
"""

import contextlib
import logging

from _pytest.logging import caplog_handler_key


def only_where_asked(plugin):
    """Has pytest's plugin leave tests without `caplog` alone."""
    caught = plugin._runtest_for

    @contextlib.contextmanager
    def run(item, when):
        if "caplog" in item.fixturenames:
            with caught(item, when):
                yield
        else:
            item.stash[caplog_handler_key] = plugin.caplog_handler  # which it takes off again
            yield

    plugin._runtest_for = run
    logging.root.addHandler(logging.NullHandler())  # as with pytest's own, nothing is printed for want of a handler
