"""Judge pictures: python examples/detect.py PATH..."""

import sys

from m2f2cli import detect

for record in detect(sys.argv[1:] or ["examples/astronaut.jpg"]):
    print(record.path, record.verdict, record.fake_probability, record.reason or record.message)
