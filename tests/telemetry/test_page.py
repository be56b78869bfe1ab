"""docs/observability.md equals the source: its metrics, its spans, its attributes."""

import re
from collections.abc import Callable
from typing import Any

from ourvidz_serverless.delivery.callback import Callback
from ourvidz_serverless.telemetry.metrics import METRICS
from tests.fakes.local_worker import LocalWorker, sdxl_payload
from tests.files import ROOT
from tests.servers.collector import Collector
from tests.servers.supabase import CallbackReceiver

PAGE = (ROOT / "docs/observability.md").read_text()

#: Attributes of spans whose names are put together.
OF_SPANS = {"ourvidz.mime", "ourvidz.status"}


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its title."""
    table = re.search(r"(?:^\|.*\n)+", PAGE.split(f"\n## {heading}\n")[1], re.M)
    assert table
    return [line.strip("| ").split(" | ") for line in table[0].splitlines()[2:]]


def words(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_page_describes_each_metric_as_it_is() -> None:
    described = {
        (*words(name), kind, *words(unit), tuple(words(attributes)))
        for name, kind, unit, attributes, _ in (row for row in rows("Metrics"))
    }

    assert described == {(each.name, each.kind, each.unit, each.attributes) for each in METRICS}


def test_no_two_metrics_have_the_same_name() -> None:
    names = [each.name for each in METRICS]

    assert len(set(names)) == len(names)


def test_the_page_describes_each_span_and_its_parent(
    observed: Callable[..., LocalWorker],
    collector: Collector,
    receiver: CallbackReceiver,
    sdxl: Any,
) -> None:
    callback = Callback(receiver.callback_url, receiver.secret)
    at = observed(models={"sdxl": sdxl}, callback=callback)
    at.run(sdxl_payload())
    at.worker.flush()
    names = {span.id: span.name for span in collector.spans()}

    described = {(*words(span), *words(parent)) for span, parent, _ in rows("Traces")}

    seen = {(span.name, names.get(span.parent_id)) for span in collector.spans()}
    # Only WAN's jobs have a prompt enhanced, and this worker has no classifier.
    others = {("job",), ("enhance", "generate"), ("safety", "generate")}
    assert described - others == seen - {("job", None)}


def test_the_page_names_each_attribute_and_no_other() -> None:
    sources = "".join(
        path.read_text() for path in (ROOT / "ourvidz_serverless/telemetry").glob("*.py")
    )

    def names(text: str) -> set[str]:
        return set(re.findall(r"[\"`]((?:ourvidz|runpod)\.[a-z_.]+)[\"`]", text))

    assert names(PAGE) == names(sources) | OF_SPANS
