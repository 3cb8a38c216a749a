"""The metrics of all replicas are on the gateway's page."""

from __future__ import annotations

import time

import httpx

LIMIT_S = 45  # Ray's processes report every ten seconds


def test_the_page_has_the_metrics_of_gateway_and_base_replicas(http: httpx.Client, url: str, served_config) -> None:
    body = {
        "model": served_config.base.model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "objective_weights": {"brief": 1.0},
    }
    assert http.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    wanted = (
        "ray_mavis_requests_total{",
        "ray_mavis_first_token_seconds_bucket{",
        "ray_mavis_tokens_total{",
        'objective="brief"',
        'status="200"',
    )
    deadline = time.monotonic() + LIMIT_S
    while missing := [part for part in wanted if part not in (page := http.get(f"{url}/metrics")).text]:
        assert time.monotonic() < deadline, missing
        time.sleep(1)
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "ray_node_" not in page.text
