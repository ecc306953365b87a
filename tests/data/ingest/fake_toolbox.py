"""What a pool's workers can be asked in tests."""

import os
import sys
import time


class FakeToolbox:
    def __init__(self, greeting):
        self.greeting = greeting

    def modules(self, _):
        yield sorted(sys.modules)

    def count(self, numbers):
        for number in numbers:
            yield self.greeting, number, os.getpid()

    def sleep(self, seconds):
        yield os.getpid()
        time.sleep(seconds)
        yield "slept"
