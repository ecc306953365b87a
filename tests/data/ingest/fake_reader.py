"""A reader of files that say what it shall do: `fake {"series": "a", "slice": 0, "value": 7, "read": "hang"}`."""

import ctypes
import json
import os
import time
from dataclasses import replace

import numpy as np

from megamed.data.privacy import Pseudonyms
from megamed.data.readers import FileHeader, Grouping, Identity, Refusal, SeriesPlan
from megamed.data.series import Series, SeriesInfo

SIZE = 8


def text(series, slice_=0, value=7, **do):
    """What a file has in it."""
    return "fake " + json.dumps({"series": series, "slice": slice_, "value": value, **do})


class FakeReader:
    name = "fake"

    def can_read(self, path, head):
        return head.startswith(b"fake ")

    def metadata(self, path, pseudonyms: Pseudonyms):
        facts = json.loads(path.read_text()[5:])
        do(facts.get("metadata"), path)
        identity = Identity(pseudonyms.of("patient", "p"), pseudonyms.of("study", "s"),
                            pseudonyms.of("series", facts["series"]))
        return FileHeader(path, self.name, identity, facts)

    def group(self, headers):
        ordered = tuple(sorted(headers, key=lambda header: (header.facts["slice"], header.path)))
        for header in ordered:
            do(header.facts.get("group"), header.path)
        ordered = tuple(header for header in ordered if header.facts.get("group") != "forget")
        count = SIZE * SIZE * sum(header.facts.get("times", 1) for header in ordered)
        plans = [SeriesPlan(self.name, ordered[0].identity, "", ordered, count)] if ordered else []
        return Grouping(plans, [])

    def read(self, plan):
        for header in plan.headers:
            json.loads(header.path.read_text()[5:])
            do(header.facts.get("read"), header.path)
        voxels = np.stack([np.full((SIZE, SIZE), header.facts["value"], np.int16) for header in plan.headers])[None]
        time.sleep(plan.headers[0].facts.get("seconds", 0))
        return Series(voxels, replace(SeriesInfo(), modality="CT", kind="volume", shape=voxels.shape, dtype="int16"))


def do(what, path):
    """Misbehave."""
    if what == "hang":
        time.sleep(1000)
    elif what == "spin":
        while True:
            pass
    elif what == "memory":
        blocks = []
        while True:
            blocks.append(np.ones(1 << 24, dtype=np.uint8))
    elif what == "crash":
        ctypes.string_at(0)
    elif what == "abort":
        os.abort()
    elif what == "killed":
        os.kill(os.getpid(), 9)
    elif what == "exit":
        raise SystemExit(0)
    elif what == "leave":
        os._exit(0)
    elif what == "interrupt":
        raise KeyboardInterrupt
    elif what == "odd":
        raise type("Odd", (BaseException,), {})("with a secret: 12345")
    elif what == "recursion":
        do(what, path)
    elif what == "fork":
        os.fork()
    elif what == "children":
        if os.fork() == 0:
            time.sleep(1000)
            os._exit(0)
    elif what == "close":
        os.closerange(3, 256)
    elif what == "print":
        os.write(1, b"secret: 12345\n")
        os.write(2, b"secret: 12345\n")
    elif what == "refuse":
        raise Refusal("truncated", "its pixel data ends early", "copy it again", path)
