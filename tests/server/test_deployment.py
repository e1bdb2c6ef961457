"""The deployment files of examples/, each by its own validator where there is one: nginx -t, systemd-analyze, promtool,
Kubernetes' schemas. KServe's custom resource has its pod checked as a pod, and the rest by a schema written here."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

import jsonschema
import pytest
from backends import EXAMPLES, free_port, nginx_configuration, replaced, tool

KUBERNETES_VERSIONS = ["1.27", "1.31", "1.34"]


def module(name: str, package: str) -> Any:
    """An optional module; without it the test is skipped, or fails under CI=true."""
    try:
        return importlib.import_module(name)
    except ImportError:
        if os.environ.get("CI") == "true":
            pytest.fail(f"no {name}: pip install {package}")
        pytest.skip(f"no {name}: pip install {package}")


def documents(name: str) -> list[dict[str, Any]]:
    yaml = module("yaml", "pyyaml")
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def check(command: list[str], expected: int = 0, **options: Any) -> str:
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False, **options
    )
    assert run.returncode == expected, run.stdout
    return run.stdout


# -- nginx, systemd ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["http", "fastcgi"])
def test_nginx(way, tmp_path):
    main = nginx_configuration(way, tmp_path, free_port(), ["127.0.0.1:1", "127.0.0.1:2"])
    main.write_text(main.read_text().replace("daemon off;", ""))
    said = check([tool("nginx", "nginx"), "-t", "-c", str(main), "-e", f"{tmp_path}/error.log"])
    assert "test is successful" in said
    assert "[warn]" not in said


def unit_text() -> str:
    return (EXAMPLES / "qwen-fast@.service").read_text()


def test_systemd(tmp_path):
    """The unit is loaded as an instance, with a program that is there in place of the one in /opt."""
    unit = tmp_path / "qwen-fast@8000.service"
    unit.write_text(replaced(unit_text(), {"ExecStart=/opt/qwen-fast/bin/qwen-fast ": f"ExecStart={sys.executable} "}))
    analyze = tool("systemd-analyze", "systemd")
    assert check([analyze, "verify", "--man=no", str(unit)]) == ""
    unit.write_text(unit.read_text().replace("Restart=on-failure", "Restart=sometimes"))
    assert "sometimes" in check([analyze, "verify", "--man=no", str(unit)]), "this check sees no mistake"


# -- commands ----------------------------------------------------------------------------------------------------


def commands() -> dict[str, list[str]]:
    """Every `qwen-fast serve` of the files, as an argument list."""
    (line,) = re.findall(r"^ExecStart=\S+/qwen-fast (.*)$", unit_text(), re.MULTILINE)
    line = line.replace("${MODEL}", "demo").replace(" $OPTIONS", "").replace("%i", "8000").replace("%d", "/run/keys")
    found = {"qwen-fast@.service": shlex.split(line)}
    for name in ("kubernetes.yaml", "kserve.yaml"):
        document = documents(name)[0]
        template = document["spec"].get("template", {}).get("spec") or document["spec"]["predictor"]
        (container,) = template["containers"]
        assert container["command"][0] == "qwen-fast"
        found[name] = [*container["command"][1:], *container["args"]]
    for name in ("nginx.conf", "nginx-fastcgi.conf"):
        for i, line in enumerate(re.findall(r"^# +qwen-fast (serve .*)$", (EXAMPLES / name).read_text(), re.MULTILINE)):
            found[f"{name} {i}"] = shlex.split(line)
    return found


def test_commands_parse():
    from qwen_fast.cli import build_parser

    parser = build_parser()
    parsed = {name: parser.parse_args(command) for name, command in commands().items()}
    assert len(parsed) == 7
    assert parsed["qwen-fast@.service"].fastcgi == "unix:/run/qwen-fast/8000/fastcgi.sock"
    assert parsed["kubernetes.yaml"].host == "0.0.0.0"


def test_the_files_agree_on_addresses():
    sockets = re.findall(r"server unix:(\S+)", (EXAMPLES / "nginx-fastcgi.conf").read_text())
    (pattern,) = re.findall(r"--fastcgi unix:(\S+)", unit_text())
    assert sockets == [pattern.replace("%i", port) for port in ("8000", "8001")]
    assert f"--connect unix:{sockets[0]}\n" in (EXAMPLES / "qwen.cgi").read_text()
    ports = re.findall(r"server (127\.0\.0\.1:\d+)", (EXAMPLES / "nginx.conf").read_text())
    assert documents("prometheus.yml")[0]["scrape_configs"][0]["static_configs"][0]["targets"] == ports


# -- Kubernetes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kubernetes(version):
    validator = module("kubernetes_validate", "kubernetes-validate")
    loaded = documents("kubernetes.yaml")
    kinds = ["Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"]
    assert [document["kind"] for document in loaded] == kinds
    for document in loaded:
        validator.validate(document, version, strict=True)
    loaded[0]["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "http"
    with pytest.raises(validator.ValidationError):
        validator.validate(loaded[0], version, strict=True)


def test_kubernetes_objects_fit_together():
    deployment, service, autoscaler, budget = (document["spec"] for document in documents("kubernetes.yaml"))
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == service["selector"] == budget["selector"]["matchLabels"]
    target = autoscaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", documents("kubernetes.yaml")[0]["metadata"]["name"])
    assert "replicas" not in deployment
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}
    names = {port["name"] for port in container["ports"]}
    probes = [container[f"{kind}Probe"]["httpGet"]["port"] for kind in ("startup", "readiness", "liveness")]
    assert names == {*probes, *(port["targetPort"] for port in service["ports"])}


def test_pods_live_longer_than_their_drain():
    for document in (documents("kubernetes.yaml")[0], documents("kserve.yaml")[0]):
        pod = document["spec"].get("template", {}).get("spec") or document["spec"]["predictor"]
        (container,) = pod["containers"]
        (drain,) = [int(a.partition("=")[2]) for a in container["args"] if a.startswith("--shutdown-timeout=")]
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])[1]
        assert pod["terminationGracePeriodSeconds"] > drain + int(sleep) + 5


# What KServe adds to a pod's specification, of the fields that are used here.
PREDICTOR = {
    "minReplicas": {"type": "integer", "minimum": 0},
    "maxReplicas": {"type": "integer", "minimum": 1},
    "scaleMetric": {"enum": ["cpu", "memory", "concurrency", "rps"]},
    "scaleTarget": {"type": "integer", "minimum": 1},
    "timeout": {"type": "integer", "minimum": 1},
}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_kserve(version):
    (service,) = documents("kserve.yaml")
    schema = {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {"const": "serving.kserve.io/v1beta1"},
            "kind": {"const": "InferenceService"},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": {
                "type": "object",
                "required": ["predictor"],
                "additionalProperties": False,
                "properties": {"predictor": {"type": "object", "properties": PREDICTOR, "required": ["containers"]}},
            },
        },
    }
    jsonschema.validate(service, schema)
    predictor = service["spec"]["predictor"]
    pod_spec = {name: value for name, value in predictor.items() if name not in PREDICTOR}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": pod_spec}
    module("kubernetes_validate", "kubernetes-validate").validate(pod, version, strict=True)
    assert predictor["containers"][0]["name"] == "kserve-container"


# -- Prometheus and Grafana --------------------------------------------------------------------------------------


@pytest.fixture
def prometheus_folder(tmp_path):
    for name in ("prometheus.yml", "prometheus-rules.yml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    key = tmp_path / "qwen-fast.key"
    key.write_text("key")
    config = tmp_path / "prometheus.yml"
    config.write_text(replaced(config.read_text(), {"/etc/prometheus/qwen-fast.key": str(key)}))
    return tmp_path


def test_prometheus(prometheus_folder):
    said = check([tool("promtool", "prometheus"), "check", "config", str(prometheus_folder / "prometheus.yml")])
    assert "prometheus.yml is valid" in said
    assert "6 rules found" in said


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    shown = ", ".join(f'{key}="{value}"' for key, value in {"instance": "a:1", "job": "qwen-fast", **labels}.items())
    return {"series": f"{name}{{{shown}}}", "values": values}


# By alert: series that fire it within 30 minutes, and the same for a healthy server.
BUCKET = "qwen_fast:time_to_first_token_seconds_bucket"
FIRING: dict[str, tuple[list[dict[str, str]], list[dict[str, str]]]] = {
    "QwenFastDown": ([series("up", "0x30")], [series("up", "1x30")]),
    "QwenFastErrors": (
        [
            series("qwen_fast:request_success_total", "0+60x30", finished_reason="stop"),
            series("qwen_fast:request_success_total", "0+3x30", finished_reason="error"),
        ],
        [
            series("qwen_fast:request_success_total", "0+60x30", finished_reason="stop"),
            series("qwen_fast:request_success_total", "0+0x30", finished_reason="error"),
        ],
    ),
    "QwenFastStuck": (
        [series("qwen_fast:num_requests_running", "4x30"), series("qwen_fast:generation_tokens_total", "900x30")],
        [series("qwen_fast:num_requests_running", "4x30"), series("qwen_fast:generation_tokens_total", "0+900x30")],
    ),
    "QwenFastQueue": (
        [series("qwen_fast:num_requests_waiting", "50x30")],
        [series("qwen_fast:num_requests_waiting", "5x30")],
    ),
    "QwenFastSlowFirstToken": (
        [series(BUCKET, "0+1x30", le="5"), series(BUCKET, "0+9x30", le="10"), series(BUCKET, "0+9x30", le="+Inf")],
        [series(BUCKET, "0+9x30", le="5"), series(BUCKET, "0+9x30", le="10"), series(BUCKET, "0+9x30", le="+Inf")],
    ),
    "QwenFastPreemptions": (
        [series("qwen_fast:num_preemptions_total", "0+60x30")],
        [series("qwen_fast:num_preemptions_total", "0+1x30")],
    ),
}


def alert_test(rule: dict[str, Any], given: list[dict[str, str]], fires: bool) -> dict[str, Any]:
    expected: list[dict[str, Any]] = []
    if fires:
        labels = {"severity": rule["labels"]["severity"], "instance": "a:1"}
        if rule["alert"] == "QwenFastDown":
            labels["job"] = "qwen-fast"
        expected = [{"exp_labels": labels}]
    tests = [{"eval_time": "30m", "alertname": rule["alert"], "exp_alerts": expected}]
    return {"interval": "1m", "input_series": given, "alert_rule_test": tests}


def test_each_alert_fires_when_it_should(prometheus_folder):
    """promtool runs the rules over made-up series. It compares annotations too, so these are left out."""
    yaml = module("yaml", "pyyaml")
    rules = documents("prometheus-rules.yml")[0]
    alerts = rules["groups"][0]["rules"]
    assert {rule["alert"] for rule in alerts} == set(FIRING)
    for rule in alerts:
        assert set(rule.pop("annotations")) == {"summary", "description"}
    (prometheus_folder / "bare.yml").write_text(yaml.safe_dump(rules))
    tests = [alert_test(rule, FIRING[rule["alert"]][0], True) for rule in alerts]
    tests += [alert_test(rule, FIRING[rule["alert"]][1], False) for rule in alerts]
    file = prometheus_folder / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": ["bare.yml"], "evaluation_interval": "1m", "tests": tests}))
    assert "SUCCESS" in check([tool("promtool", "prometheus"), "test", "rules", str(file)])


def dashboard() -> dict[str, Any]:
    return json.loads((EXAMPLES / "grafana-dashboard.json").read_text())


def expressions() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    assert len(found) > 30
    return found


def test_grafana_queries(tmp_path):
    """Each query is PromQL, as promtool sees it in a recording rule, with Grafana's variables filled in."""
    rules = [
        {"record": f"query_{i}", "expr": expression.replace("$__rate_interval", "1m")}
        for i, expression in enumerate(expressions())
    ]
    file = tmp_path / "queries.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in check([tool("promtool", "prometheus"), "check", "rules", str(file)])
    rules[0]["expr"] += ")"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert "parse error" in check([tool("promtool", "prometheus"), "check", "rules", str(file)], expected=1)


def test_grafana_panels():
    """Ids are unique, no panel covers another, each has a title and the chosen data source, and variables exist."""
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    areas = []
    for panel in panels:
        place = panel["gridPos"]
        assert panel["title"]
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24
        areas.append(
            {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
        )
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            ids = [target["refId"] for target in panel["targets"]]
            assert len(set(ids)) == len(ids)
    assert not any(a & b for a, b in itertools.combinations(areas, 2))
    names = {variable["name"] for variable in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(board))) - {"__rate_interval", "__all"}
    assert used == names


# What the meter counts, which vLLM has not.
COST_METRICS = ["energy_joules", "device_seconds", "bytes", "tokens"]
# vLLM's metrics, which the server has as qwen_fast:NAME and vllm:NAME, by kind.
METRICS = {
    "gauge": ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"],
    "counter": [
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "generation_tokens",
        "request_success",
    ],
    "histogram": [
        "request_prompt_tokens",
        "request_generation_tokens",
        "time_to_first_token_seconds",
        "time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
    ],
}


def test_metrics_are_used_by_their_kind():
    """Counters end in _total and stand in rate(), histograms are read by their buckets, gauges as they are."""
    alerts = [rule["expr"] for rule in documents("prometheus-rules.yml")[0]["groups"][0]["rules"]]
    used = set()
    for expression in [*expressions(), *alerts]:
        for before, name in re.findall(r"(rate\()?qwen_fast:([a-z0-9_]+)", expression):
            suffix = "_total" if name.endswith("_total") else "_bucket" if name.endswith("_bucket") else ""
            kind = {"_total": "counter", "_bucket": "histogram", "": "gauge"}[suffix]
            assert name.removesuffix(suffix) in (*METRICS[kind], *(COST_METRICS if kind == "counter" else ())), (
                expression
            )
            assert bool(before) == (kind != "gauge"), expression
            used.add(name.removesuffix(suffix))
    assert used == {name for names in METRICS.values() for name in names} | set(COST_METRICS)
    assert "'qwen_fast:num_requests_waiting'" in (EXAMPLES / "kubernetes.yaml").read_text()
