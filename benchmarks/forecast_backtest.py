"""How good forecasts would have been: curves fitted to few labels, compared with what more labels then scored.

Reads the scores of sweeps in ``results/``: budgets up to 8 are known, the larger ones are predicted.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from common import RESULTS, provenance, write

from labeleff.evaluation.forecasting import FARTHEST, Forecast

KNOWN = 8
SWEEPS = ("left_atrium", "acdc")


def cells_of(result: dict[str, Any], method: str) -> dict[int, np.ndarray]:
    """Return scores [draw, 1, patient] by number of labels."""
    tables = result["tables"]
    labels = {row["labelled"]: row["labels"] for row in tables["curves"] if row["method"] == method}
    found = {}
    for labelled, number in labels.items():
        own = sorted(
            (row for row in tables["scores"] if (row["method"], row["labelled"]) == (method, labelled)),
            key=lambda row: row["draw"],
        )
        found[number] = np.array([[[row["patients"][p] for p in sorted(row["patients"])]] for row in own])
    return dict(sorted(found.items()))


def main() -> None:
    """Predict, compare, write."""
    rows = []
    for name in SWEEPS:
        result = json.loads((RESULTS / f"{name}.json").read_text())
        if "tables" not in result:
            continue
        cells = cells_of(result, result["benchmark"]["baseline"])
        known = [n for n in cells if n <= KNOWN]
        curve = Forecast(known, [cells[n] for n in known])
        for labels in cells:
            if KNOWN < labels <= FARTHEST * known[-1]:
                expected, observed = curve.at(labels), float(cells[labels].mean())
                rows.append(
                    {
                        "sweep": name,
                        "fitted": known,
                        "labels": labels,
                        "forecast": expected.value,
                        "interval": [expected.low, expected.high],
                        "observed": observed,
                        "error": expected.value - observed,
                        "covered": bool(expected.low <= observed <= expected.high),
                    }
                )
                print(rows[-1])
    write("forecast_backtest", {**provenance(), "rows": rows})


if __name__ == "__main__":
    main()
