"""Counts what the tests did, for the page on reliability: `--record` writes them through the project's own records."""

import time
from collections import defaultdict
from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write the counts to figures/cpu/reliability.json")


def pytest_collection_modifyitems(items):
    for item in items:
        if getattr(item.function, "is_hypothesis_test", False):
            settings = getattr(item.function, "_hypothesis_internal_use_settings", None)
            item.user_properties.append(("examples", settings.max_examples if settings else 100))


class Counts:
    "What became of the tests, by file; tests of properties by themselves."

    def __init__(self):
        self.began, self.suites = time.perf_counter(), defaultdict(lambda: dict.fromkeys(FIELDS, 0))

    def pytest_runtest_logreport(self, report):
        examples = dict(report.user_properties).get("examples", 0)
        name = "properties" if examples else Path(report.fspath).stem.removeprefix("test_")
        suite = self.suites[name]
        suite["seconds"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            suite["cases"] += 1
            suite["examples"] += examples
            suite[report.outcome] += 1

    def pytest_sessionfinish(self, session, exitstatus):
        from nsq_repro import reliability

        if exitstatus in (0, 1) and not hasattr(session.config, "workerinput"):  # to the end, in the first process
            reliability.save_counts(self.suites, time.perf_counter() - self.began)


FIELDS = ("cases", "passed", "failed", "skipped", "examples", "seconds")


def pytest_configure(config):
    if config.getoption("--record"):
        config.pluginmanager.register(Counts(), "counts")
