"""Claims and `nsq-repro verify`: a real record set passes, and one changed number anywhere in it does not."""

import base64
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from nsq_repro import claims, cli, mnist, plots, records, results, tables
from nsq_repro.data import load, pixel_record
from nsq_repro.experiments import AttackParameters, accuracy_record, decide, run_protocol
from nsq_repro.objective import gradient_record, iterate_clouds
from nsq_repro.training import training_cost

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("natural", "pgd", "sq", "nsq")


def save_all(record, cost, nets, test):
    "Every item of the MNIST notebook, from a run on the digits."
    made = {k: record[k] for k in ("scale", "seed", "data", "provenance")}
    sources = {
        "fig1": {
            **made,
            **iterate_clouds(nets, test.floats(slice(0, 1)), test.y[:1], steps=4, step_size=0.1, restarts=5),
        },
        "fig2": {"scale": "cpu", "spec": {"K": 8, "alpha": 1000.0}},
        "fig3": record,
        "fig3-worst": record,
        "fig8": {**made, "images": records.images_to_text(test.x[:4]), "spec": {"K": 1, "alphas": [10.0, 1000.0]}},
    }
    for item, source in sources.items():
        records.save_figure(results.draw(item, source), item, source, "cpu")
    for item in ("mnist-accuracy", "mnist-accuracy-worst"):
        records.save_table(item, *results.draw_table(item, record), {**made, "figure": "fig3"}, "cpu")
    cost = {**made, **{k: cost[k] for k in ("seconds_per_iteration", "specs", "provenance")}}
    records.save_table("mnist-cost", *results.draw_table("mnist-cost", cost), cost, "cpu")
    pixels = {**made, **pixel_record(test)}
    records.save_table("mnist-pixels", *tables.pixel_table(pixels), pixels, "cpu")
    gradients = {**made, **gradient_record(nets, test, 0.3, n=4)}
    records.save_table("mnist-gradients", *tables.gradient_table(gradients), gradients, "cpu")
    claims.save("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A home with the records of a small real run, its tables and figures."
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSQ_HOME", str(home))
        training = {m: dict(iterations=3, batch_size=10) for m in MODELS}
        training["pgd"] |= dict(steps=2, step_size=0.1)
        preset = {
            **mnist.PRESETS["smoke"],
            "training": training,
            "models": MODELS,
            "n_test": 20,
            "steps": 2,
            "eps": (0.0, 0.1, 0.3),
        }
        p = decide("mnist", {"cpu": preset}, AttackParameters(scale="cpu", device="cpu"))
        fit, test = load("digits", "train"), load("digits")
        nets, trained, evaluated = run_protocol(p, fit, test, progress=False)
        cost = training_cost([s for s in p.train if s.model in ("pgd", "nsq")], fit, rounds=2, iterations=1)
        save_all(accuracy_record(p, trained, evaluated, cost), cost, nets, test)
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    "A copy of it to spoil."
    shutil.copytree(made / "figures", tmp_path / "figures")
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    return tmp_path / "figures" / "cpu"


def problems(path):
    return results.check_file(path)["problems"]


def change(path, edit, sign=True):
    "Change a record in place; with a digest that fits, unless told otherwise."
    record = json.loads(path.read_text())
    edit(record)
    (records.save_record if sign else records.save_json)(path, record)


def test_what_a_run_left_is_verified(home, capsys):
    assert cli.main(["verify"]) == 0
    said = capsys.readouterr().out
    assert "verified 11 files" in said and "MISMATCH" not in said
    assert said.count("redrawn") == 5 and "32 curves counted" in said and "false as stated" in said
    assert all(str(c["value"]) in said for c in records.paper(dataset="mnist", kind="measured") if c["unit"] == "%")
    for c in claims.claims_rows("cpu"):  # digits decide nothing about the paper's data
        assert c["verdict"] == claims.UNTESTED or claims.rule_of({k["id"]: k for k in records.paper()}[c["id"]]) in (
            *claims.MATHEMATICS,
            "fill",
            "slopes",
        )


def flip(outcomes, i):
    bits = bytearray(base64.b64decode(outcomes))
    bits[i // 8] ^= 1 << (7 - i % 8)
    return base64.b64encode(bytes(bits)).decode()


def series(record, **which):
    return next(s for s in record["series"] if all(s[k] == v for k, v in which.items()))


def spoil_accuracy(r):
    r["series"][0]["accuracy"][0] += 0.05


def spoil_outcome(r):
    r["series"][0]["outcomes"][0] = flip(r["series"][0]["outcomes"][0], 3)


def spoil_interval(r):
    r["series"][5]["high"][-1] -= 1e-4


def spoil_count(r):
    r["series"][2]["correct"][1] += 1


def spoil_n(r):
    r["series"][2]["n"] += 1


def spoil_worst(r):
    series(r, accounting="worst", model="nsq")["outcomes"][-1] = records.pack(np.ones(20, bool))


def spoil_radius(r):
    r["series"][0]["eps"][1] = 0.12


def spoil_seed(r):
    r["seed"] = 7


def spoil_steps(r):
    r["attack"]["steps"] = 100


def spoil_scale(r):
    r["scale"] = "paper"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_accuracy,
        spoil_outcome,
        spoil_interval,
        spoil_count,
        spoil_n,
        spoil_worst,
        spoil_radius,
        spoil_seed,
        spoil_steps,
        spoil_scale,
    ],
)
def test_a_changed_number_in_a_record_is_found(spoil, home):
    change(home / "fig3.json", spoil)
    assert problems(home / "fig3.json")


def test_a_consistent_lie_is_found(home):
    """An outcome changed together with count, accuracy and interval: the record fits, the figure,
    tables and claims made from it do not."""

    def lie(r):
        s = series(r, model="natural", loss="ce", accounting="last")
        bits = ~records.unpack(s["outcomes"][-1], s["n"])
        s["outcomes"][-1], s["correct"][-1], s["accuracy"][-1] = records.pack(bits), int(bits.sum()), bits.mean().item()
        s["low"][-1], s["high"][-1] = claims.wilson(bits.sum(), s["n"])
        w = series(r, model="natural", loss="ce", accounting="worst")
        worst = records.unpack(w["outcomes"][-1], w["n"]) & bits
        w["outcomes"][-1], w["correct"][-1], w["accuracy"][-1] = (
            records.pack(worst),
            int(worst.sum()),
            worst.mean().item(),
        )
        w["low"][-1], w["high"][-1] = claims.wilson(worst.sum(), w["n"])

    change(home / "fig3.json", lie)
    assert not results.check_series(json.loads((home / "fig3.json").read_text()))
    assert problems(home / "fig3.json") and problems(home / "mnist-accuracy.json")


def spoil_iterate(r):
    r["paths"][1]["xy"][0][1][0] *= 0.5


def spoil_alpha(r):
    r["spec"]["alpha"] = 1001.0


def spoil_pixel(r):
    r["images"]["base64"] = (
        "AAAA" + r["images"]["base64"][4:]
        if not r["images"]["base64"].startswith("AAAA")
        else "////" + r["images"]["base64"][4:]
    )


def spoil_time(r):
    r["seconds_per_iteration"]["nsq"][0] *= 1.5


def spoil_row(r):
    r["rows"][0]["measured"] += 1


def spoil_sum(r):
    r["counts"][0]["sum"] += 1000


def spoil_gradient(r):
    r["largest"]["nsq"] = [2 * v + 1 for v in r["largest"]["nsq"]]


def spoil_verdict(r):
    r["rows"][0]["verdict"] = "reproduced"


def spoil_setting(r):
    r["settings"][0]["used"] = "9"


@pytest.mark.parametrize(
    "item, spoil",
    [
        ("fig1", spoil_iterate),
        ("fig2", spoil_alpha),
        ("fig8", spoil_pixel),
        ("mnist-cost", spoil_time),
        ("mnist-accuracy", spoil_row),
        ("mnist-pixels", spoil_sum),
        ("mnist-gradients", spoil_gradient),
        ("claims", spoil_verdict),
        ("claims", spoil_setting),
    ],
)
def test_other_records(item, spoil, home):
    change(home / f"{item}.json", spoil)
    assert problems(home / f"{item}.json")


@pytest.mark.parametrize(
    "name", ["mnist-accuracy.csv", "mnist-accuracy.md", "mnist-cost.csv", "claims.md", "claims.csv", "fig3.svg"]
)
def test_a_changed_digit_in_what_was_made(name, home):
    path = home / name
    text = path.read_text()
    places = [m.start() for m in re.finditer(r"\d", text)]
    i = places[len(places) // 2]
    path.write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
    assert problems(path.with_suffix(".json"))


def test_a_changed_picture(home):
    shutil.copy(home / "fig3.png", home / "fig3-worst.png")
    assert problems(home / "fig3-worst.json") == ["fig3-worst.png is not what its record draws"]


def test_a_changed_value_of_the_paper(home, monkeypatch):
    entries = records.paper()
    next(c for c in entries if c["id"] == "mnist-nsq-bpda-0.3")["value"] = 87.23
    monkeypatch.setattr(
        records, "paper", lambda **where: [c for c in entries if all(c.get(k) == v for k, v in where.items())]
    )
    assert problems(home / "claims.json")


def test_a_time_is_found_by_the_digest(home):
    "A time is drawn nowhere."
    path = home / "fig3.json"
    assert not problems(path)
    change(path, lambda r: r["training"]["nsq"].update(seconds=1.0), sign=False)
    assert "digest" in problems(path)[0]
    change(path, lambda r: r.pop("digest"), sign=False)
    assert "digest" in problems(path)[0]


def test_missing_damaged_and_unknown_files(home, capsys):
    (home / "fig1.svg").unlink()
    assert problems(home / "fig1.json") == ["fig1.svg is missing"]
    (home / "fig2.json").write_text('{"spec": ')
    assert "damaged" in problems(home / "fig2.json")[0]
    (home / "fig8.json").unlink()
    (home / "mnist-cost.csv").unlink()
    assert cli.main(["verify", "--scale", "cpu"]) == 1
    said = capsys.readouterr().out
    assert "fig8.svg: has no record" in said and "mismatches" in said and "mnist-cost.csv" in said


def test_another_matplotlib_checks_numbers_only(home):
    change(home / "fig3.json", lambda r: r.update(drawn_with={"matplotlib": "0.1"}))
    (home / "fig3.svg").write_text("<svg/>")
    result = results.check_file(home / "fig3.json")
    assert not result["problems"] and "numbers only" in result["said"] and plots.mpl.__version__ in result["said"]
    change(home / "fig3.json", spoil_interval)
    assert problems(home / "fig3.json")


def test_nothing_to_verify(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NSQ_HOME", str(tmp_path))
    assert cli.main(["verify"]) == 0
    said = capsys.readouterr().out
    assert "verified 0 files" in said and "no records yet" in said


def test_what_says_the_same_is_not_written_again(made, monkeypatch):
    monkeypatch.setenv("NSQ_HOME", str(made))
    path = records.figure_dir("cpu") / "claims.json"
    clean = {**records.load_json(path), "provenance": {**records.load_json(path)["provenance"], "dirty": False}}
    records.save_record(path, clean)
    assert claims.save("cpu") == []
    records.save_record(path, {**clean, "provenance": {**clean["provenance"], "dirty": True}})
    assert path in claims.save("cpu")  # a clean commit may have made it by now
    path.write_text("{")
    assert path in claims.save("cpu")


def test_links_lead_somewhere():
    "Every page a verdict links to has that label, if the page is there yet."
    cells = {r["cell"] for r in claims.claims_rows("cpu")} | {i.cell for i in results.items().values()} - {""}
    for page, _, label in (c.partition("#") for c in cells):
        if label and (path := ROOT / "nbs" / page).exists():
            text = "".join("".join(c["source"]) + "\n" for c in json.loads(path.read_text())["cells"])
            headings = {
                re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", text, re.M)
            }
            assert f"{{#{label}}}" in text or f"#| label: {label}\n" in text or label in headings, (page, label)


def test_every_claim_has_a_rule():
    known = {*claims.RULES, *claims.MATHEMATICS, "none"}
    for c in records.paper():
        if c["kind"] != "setting":
            assert claims.rule_of(c) in known, c["id"]
    assert set(claims.MATHEMATICS) <= {claims.rule_of(c) for c in records.paper() if c["kind"] != "setting"}


@pytest.mark.skipif(os.environ.get("NSQ_HOME") is not None, reason="looks at the figures that are committed")
def test_committed_figures_are_what_their_records_say():
    assert [r for r in results.verify() if r["problems"]] == []
