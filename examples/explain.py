"""Say why: python examples/explain.py PICTURE [EXPLAINER]"""

import sys

from m2f2cli import explain

picture, *model = sys.argv[1:]
for record in explain([picture], **({"model": model[0]} if model else {})):
    print(record.path, record.verdict, record.fake_probability)
    for face in record.explanations:
        print("language model:", face.judgement_text)
        for reason in face.reasons:
            print(f"{reason.region or reason.question}: {reason.text}")
