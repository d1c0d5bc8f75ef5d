"""What a person saw in generated pictures, beside the judge's word."""

import json

from tools.starter.labels import LABELS, compare


def test_a_hundred_pictures_have_a_label_for_every_expert_of_their_set() -> None:
    labels = json.loads(LABELS.read_text())
    assert len(labels) == 100
    for picture, letters in labels.items():
        assert len(letters) == len(picture.split("/")[1].split("+"))
        assert set(letters) <= set("1h0")


def test_agreement_counts_what_is_there_and_not_whether_it_is_whole() -> None:
    rows = [
        {
            "picture": name,
            "method": method,
            "set": "cat+wolf",
            "scores": {
                "present": dict(zip(("cat", "wolf"), present, strict=True)),
                "crop": {"cat": 0.9, "wolf": crop},
            },
        }
        for name, method, present, crop in (("a", "la", (1, 1), 0.2), ("b", "gates", (1, 1), 0.8))
    ]
    lines = compare({"a": "h0", "b": "11"}, rows).splitlines()
    assert lines[2] == "| la | 2 | 50 % | 0 % | 100 % | 50 % | 1.00 |"
    assert "| gates | 2 | 100 % | 100 % | 100 % | 100 % |  |" in lines
    assert lines[-1] == "| all | 4 | 75 % | 50 % | 100 % | 75 % | 1.00 |"
