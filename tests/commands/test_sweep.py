"""`varlab sweep`, and sweeps that were stopped."""

import json

from support.runs import ledger


def test_a_stopped_sweep_continues_where_it_stopped(tmp_path, sweep):
    settings = [*sweep.settings, "model.depth=1,2,3"]
    stop = ["+callbacks.stop={_target_: support.fault_callbacks.Signal, step: 4, name: SIGTERM, to_parent: true}"]
    process = sweep.start(*settings, *stop)
    said = process.communicate(timeout=200)[0]
    assert process.returncode not in (0, None), said[-2000:]
    jobs = ledger(tmp_path)
    assert [job["state"] for job in jobs.values()] == ["stopped"]
    code, told = sweep("status", "runs/sweep", verb="sweep")
    assert "1 stopped, 2 pending" in told
    code, said = sweep("resume", "runs/sweep", verb="sweep")  # its Signal is for fresh runs: the other two stop once
    assert "stopped" in said
    for _ in range(2):
        code, said = sweep("resume", "runs/sweep", verb="sweep")
    assert code == 0, said[-2000:]
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/sweep/*/run.json"))]
    assert [(row["depth"], row["state"], row["images_seen"]) for row in rows] == [
        (depth, "finished", 72) for depth in (1, 2, 3)
    ]
