"""Of large products of cases an evenly spread part.

    @pytest.mark.every(3)

keeps the cases of a test whose places in the lists of values add up to a multiple of 3: of methods and layers each
method with every third layer, another third for the next method.  Every value of every list is met all the same, which
is checked here.  `--all-cases` runs all of them, as a case that is asked for by its name, or with -k, is.
"""

import pytest

MARKER = "every(n): of the product of this test's cases one in n, in which each value is met; see support/thinning.py"


def deselect(config, items):
    if config.option.all_cases or config.option.keyword or any("[" in word for word in config.args):
        return
    marked = {}
    for item in items:
        if item.get_closest_marker("every"):
            marked.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left = {item for name, cases in marked.items() for item in left_out(name, cases)}
    config.hook.pytest_deselected(items=list(left))
    items[:] = [item for item in items if item not in left]


def left_out(name, cases):
    """The cases of one test that are not run.  Raises UsageError where a value would not be met any more."""
    (number,), known = cases[0].get_closest_marker("every").args, {}
    places = [placed(case, known) for case in cases]
    left = [sum(place.values()) % number > 0 for place in places]
    kept = {each for place, out in zip(places, left, strict=True) if not out for each in place.items()}
    if kept != {each for place in places for each in place.items()}:
        raise pytest.UsageError(f"{name}: of one in {number} of its cases some value is in none")
    return [case for case, out in zip(cases, left, strict=True) if out]


def placed(case, known):
    """{parameter: the place of this case's value among its values, as they come}."""
    for name, value in case.callspec.params.items():
        known.setdefault(name, {}).setdefault(id(value), len(known[name]))
    return {name: known[name][id(value)] for name, value in case.callspec.params.items()}
