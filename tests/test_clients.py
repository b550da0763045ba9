"""tests/clients/run_clients.py, without the clients, whose environments take minutes and a network."""

import sys

import numpy as np
from conftest import ROOT

sys.path.append(str(ROOT / "tests" / "clients"))
import run_clients


def test_clients_get_what_this_version_makes_and_keep_their_environments(tmp_path, monkeypatch):
    environment = tmp_path / "environments" / "onnx" / ".complete"
    for path in (environment, tmp_path / "space" / "app.py", tmp_path / "prepared" / "space" / "app.py"):
        path.parent.mkdir(parents=True)
        path.write_text("of an earlier version")
    places = []
    monkeypatch.setattr(run_clients, "run", lambda client, place: places.append(place) or True)
    monkeypatch.setattr(sys, "argv", ["run_clients.py", "onnx", "--place", str(tmp_path)])
    assert run_clients.main() == 0
    (place,) = places
    assert (place / "space" / "app.py").read_bytes() == (ROOT / "publish" / "space" / "app.py").read_bytes()
    vectors = np.load(place / "space" / "vectors.npy")
    assert np.allclose(vectors, np.load(place / "expected.npy"), atol=1e-3)
    assert environment.exists()
