"""A page of the report as its tags and its text, and the files that it is made of."""

import html
import html.parser
import json

from rlhf_jax.runtime.report.page import write_report


class Page(html.parser.HTMLParser):
    """Tags, their attributes, the text, and whether all elements are closed in order."""

    VOID = frozenset({"meta", "link", "path", "br", "img"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.scripts = [], [], "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in ("p", "li"):  # closed by what follows
            while self.open[-1] != tag:
                self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data


def write_lines(path, entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def ppo_lines(steps=40):
    return [
        {
            "step": step,
            "time": 1e9 + 3 * step,
            "objective/scores": step / 10,
            "objective/gold": 2 - (step / 20 - 1) ** 2,
            "objective/kl": step / 4,
            "loss/policy_avg": -0.01,
            "perf/tokens_per_sec": 5e3,
            "my/own": 3.0,
        }
        for step in range(1, steps + 1)
    ]


def read(run):
    return Page(write_report(run).read_text())
