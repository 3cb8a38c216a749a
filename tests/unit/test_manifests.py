"""k8s/ and the files of Ray's cluster launcher: valid as far as can be checked without machines, and consistent with
each other and with the files they name."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from jobs import arguments
from mavis_dist.config import Config
from mavis_dist.plan import Node, make_plan
from serve.app import MAIN
from serve.settings import MainArgs, ValueArgs
from tests import kubernetes
from tests.root import ROOT

K8S = ROOT / "k8s"
OVERLAYS = ("cpu", "gpu")
CLUSTER_YAML = ROOT / "ray_cluster.yaml"
LOCAL_YAML = ROOT / "ray_cluster.local.yaml"
RAY_VERSION = "2.60.0"
GPU = "nvidia.com/gpu"
RAY_PODS = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
QUANTITY_SUFFIXES = {"m": Decimal("0.001"), "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
KUSTOMIZE = next(
    (command for command in (["kubectl", "kustomize"], ["kustomize", "build"]) if shutil.which(command[0])), None
)


def parse(text: str) -> list[dict]:
    return [document for document in yaml.safe_load_all(text) if document]


def render(folder: Path) -> list[dict]:
    """What `kubectl apply -k` would send; without kubectl and kustomize the files as written, with their patches."""
    if KUSTOMIZE is None:
        return assemble(folder)
    done = subprocess.run([*KUSTOMIZE, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


def assemble(folder: Path) -> list[dict]:
    rules = kustomization(folder)
    manifests = []
    for path in (folder / name for name in [*rules["resources"], *rules.get("components", [])]):
        manifests += assemble(path) if path.is_dir() else parse(path.read_text())
    for patch in rules.get("patches", []):
        for change in yaml.safe_load((folder / patch["path"]).read_text()):
            put(only(manifests, patch["target"]["kind"]), change["path"], change["value"])
    return manifests


def put(tree, path: str, value) -> None:
    """A JSON patch that adds to the end of a list, or replaces a value."""
    *parents, last = path.strip("/").split("/")
    for name in parents:
        tree = tree[name]
    if last == "-":
        tree.append(value)
    else:
        tree[last] = value


def kustomization(folder: Path) -> dict:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def manifests(overlay) -> list[dict]:
    return render(K8S / "overlays" / overlay)


def only(manifests: list[dict], kind: str) -> dict:
    (found,) = (m for m in manifests if m["kind"] == kind)
    return found


def mappings(tree) -> Iterator[dict]:
    """Every mapping in a tree of mappings and lists, outermost first."""
    if isinstance(tree, dict):
        yield tree
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from mappings(branch)


def containers(tree) -> list[dict]:
    return [c for m in mappings(tree) for key in ("initContainers", "containers") for c in m.get(key, [])]


def ray_containers(tree) -> list[dict]:
    return [c for c in containers(tree) if c["name"] in ("ray-head", "ray-worker", "ray-job-submitter")]


def quantity(text: str) -> Decimal:
    """A Kubernetes quantity such as 500m, 8 or 32Gi."""
    number = text.rstrip("mKMGTi")
    suffix = text[len(number) :]
    return Decimal(number) * (QUANTITY_SUFFIXES[suffix] if suffix else 1)


def worker_groups(manifests) -> dict[str, dict]:
    return {group["groupName"]: group for group in only(manifests, "RayCluster")["spec"]["workerGroupSpecs"]}


def resources(group: dict) -> Node:
    """Of a worker pod, as Ray counts them."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return Node(float(quantity(limits["cpu"])), float(quantity(limits.get(GPU, "0"))))


def job_config(manifests) -> Config:
    command, *options = re.split(r"(?= --config)", only(manifests, "RayJob")["spec"]["entrypoint"])
    assert command == "python -m jobs.pipeline"
    return arguments.parse("pipeline", "", shlex.split("".join(options)))


def served(manifests) -> dict:
    return yaml.safe_load(only(manifests, "RayService")["spec"]["serveConfigV2"])


def arguments_of(application: dict) -> MainArgs | ValueArgs:
    return (MainArgs if application["name"] == MAIN else ValueArgs)(**application["args"])


# k8s/


def test_every_field_is_one_that_its_kind_has(manifests):
    for manifest in manifests:
        kubernetes.check(manifest)


def test_a_misspelt_field_is_found(manifests):
    for kind, misspelt in (("RayCluster", "rayversion"), ("RayService", "serveConfig"), ("HTTPRoute", "host")):
        manifest = only(manifests, kind)
        with pytest.raises(ValidationError, match=misspelt):
            kubernetes.check(manifest | {"spec": manifest["spec"] | {misspelt: "x"}})


def test_every_resource_is_there(manifests):
    kinds = [m["kind"] for m in manifests]
    for kind in ("RayCluster", "RayJob", "RayService", "PersistentVolumeClaim", "PodMonitor", "HTTPRoute"):
        assert kinds.count(kind) == 1
    assert kinds.count("NetworkPolicy") == 3


def test_names_are_unique_within_a_kind_and_of_one_namespace(manifests):
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(names) == len(set(names))
    assert {m["metadata"].get("namespace", "mavis") for m in manifests} == {"mavis"}


def test_every_file_is_used():
    """A manifest that no kustomization names would never be applied."""
    for rules in K8S.rglob("kustomization.yaml"):
        found = kustomization(rules.parent)
        named = {*found["resources"], *(patch["path"] for patch in found.get("patches", []))}
        present = {path.name for path in rules.parent.glob("*.yaml")} - {rules.name, "secrets.template.yaml"}
        assert present == {name for name in named if not name.startswith("..")}, rules


def test_every_container_states_what_it_needs(manifests):
    found = containers(manifests)
    assert len(found) >= 4  # head, worker, submitter, Valkey
    for container in found:
        requests, limits = (container["resources"][k] for k in ("requests", "limits"))
        assert {"cpu", "memory"} <= requests.keys() == limits.keys(), container["name"]
        for resource, wanted in requests.items():
            assert 0 < quantity(wanted) <= quantity(limits[resource]), (container["name"], resource)


def test_autoscaler_states_what_it_needs(manifests):
    options = only(manifests, "RayCluster")["spec"]["autoscalerOptions"]
    assert options["version"] == "v2"
    assert all(quantity(v) > 0 for group in ("requests", "limits") for v in options["resources"][group].values())


def test_the_autoscaler_replaces_pods_instead_of_restarting_them(manifests):
    """Its second version refuses any other policy than Never, which KubeRay sets where none is given."""
    for pod in (m for m in mappings(only(manifests, "RayCluster")) if "containers" in m):
        assert "restartPolicy" not in pod


def test_pods_have_no_privileges(manifests):
    pods = [m for m in mappings(manifests) if "containers" in m]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    # Only the head uses Kubernetes' API, for the autoscaler.
    with_token = [pod for pod in pods if pod.get("automountServiceAccountToken", True)]
    assert {pod["containers"][0]["name"] for pod in with_token} == {"ray-head"}


def test_ray_takes_whole_cpus_and_gpus_from_worker_limits(manifests):
    """A fractional CPU limit would be rounded up by KubeRay, and Ray would place more than the pod can run."""
    for container in ray_containers(only(manifests, "RayCluster")):
        for resource in ("cpu", GPU):
            wanted = quantity(container["resources"]["limits"].get(resource, "0"))
            assert wanted == wanted.to_integral_value(), container["name"]


def test_worker_groups(manifests, overlay):
    spec = only(manifests, "RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = worker_groups(manifests)
    assert groups.keys() == ({"cpu"} if overlay == "cpu" else {"cpu", "gpu"})
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert (resources(group).gpus > 0) == (name == "gpu")


def test_all_ray_pods_have_the_same_environment_but_for_that_of_gpus(manifests):
    head, *workers = ([str(v) for v in c["env"]] for c in ray_containers(only(manifests, "RayCluster")))
    assert all(set(head) <= set(worker) for worker in workers)


def test_the_job_fits_on_the_pods_that_are_always_there(manifests):
    """The pipeline counts the machines that are up when it starts."""
    config = job_config(manifests)
    groups = worker_groups(manifests).values()
    plan = make_plan(config, [resources(group) for group in groups for _ in range(group["minReplicas"])])
    assert not [note for note in plan.notes if "rollout.actors" in note]
    assert config.storage == "/shared/runs"


def test_the_service_serves_the_run_of_the_job(manifests):
    config = job_config(manifests)
    main, *values = map(arguments_of, served(manifests)["applications"])
    assert {value.objective for value in values} == config.objectives.keys()
    for args in (main, *values):
        assert (args.run, args.storage, args.base) == (config.run, config.storage, config.base.model)
        assert (args.device, args.dtype) == (config.base.device, config.base.dtype)
    assert main.tensor_parallel == config.base.tensor_parallel


def test_the_serve_config_has_no_key_that_serve_would_drop(manifests):
    from ray.serve.schema import ServeDeploySchema

    for config in (served(manifests), yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())):
        assert ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True, mode="json") == config
        for application in config["applications"]:
            arguments_of(application)
    config["http_options"]["hots"] = "0.0.0.0"
    assert ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True, mode="json") != config


def test_requests_reach_a_proxy(manifests):
    """KubeRay sends requests to worker pods, and counts those without a proxy as not ready."""
    assert only(manifests, "RayService")["spec"]["excludeHeadPodFromServeSvc"] is True
    assert served(manifests)["proxy_location"] == "EveryNode"


def test_the_service_fits_on_one_pod(manifests, overlay):
    """A group of processes on two of them would exchange activations over the network."""
    main, *values = map(arguments_of, served(manifests)["applications"])
    gpus = main.tensor_parallel * main.gpus + sum(value.gpus for value in values)
    cpus = main.tensor_parallel * main.cpus + main.cpus + sum(value.cpus for value in values)
    pod = resources(worker_groups(manifests)[overlay])
    assert cpus <= pod.cpus
    assert gpus <= pod.gpus


def test_a_group_has_a_pod_of_its_own_gpus():
    group = worker_groups(gpu := render(K8S / "overlays" / "gpu"))["gpu"]
    size = job_config(gpu).base.tensor_parallel
    assert size > 1
    assert resources(group).gpus % size == 0
    pod = group["template"]["spec"]
    (shared,) = (volume for volume in pod["volumes"] if "emptyDir" in volume)
    assert {"name": shared["name"], "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]
    # Ray's object store and NCCL's buffers share it.
    store = int(group["rayStartParams"]["object-store-memory"])
    assert store < quantity(shared["emptyDir"]["sizeLimit"])
    assert quantity(shared["emptyDir"]["sizeLimit"]) < quantity(pod["containers"][0]["resources"]["limits"]["memory"])
    interfaces = {v["name"]: v.get("value") for v in pod["containers"][0]["env"] if v["name"].endswith("_IFNAME")}
    assert interfaces == {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize("folder", ["base", "overlays/gpu"])
def test_the_service_gets_the_cluster_spec(folder):
    """Wherever the spec of the cluster is changed, it is copied again."""
    (rule,) = kustomization(K8S / folder)["replacements"]
    assert rule["source"] == {"kind": "RayCluster", "fieldPath": "spec"}
    manifests = render(K8S / folder)
    if KUSTOMIZE is not None:
        assert only(manifests, "RayService")["spec"]["rayClusterConfig"] == only(manifests, "RayCluster")["spec"]


def test_every_ray_cluster_asks_for_a_token(manifests):
    specs = [m for m in mappings(manifests) if "headGroupSpec" in m]
    assert specs
    for spec in specs:
        assert spec["authOptions"] == {"mode": "token", "secretName": "mavis-ray-token"}


def test_one_image_and_one_ray_version(manifests):
    assert len({container["image"] for container in ray_containers(manifests)}) == 1
    assert {m["rayVersion"] for m in mappings(manifests) if "rayVersion" in m} == {RAY_VERSION}
    assert f"FROM rayproject/ray:{RAY_VERSION}-" in (K8S / "Dockerfile").read_text()
    (renamed,) = kustomization(K8S / "base")["images"]
    assert kustomization(K8S / "overlays" / "gpu")["images"] == [renamed]
    for guide in ("Dockerfile", "README.md"):
        assert f"{renamed['newName']}:{renamed['newTag']}" in (K8S / guide).read_text()


def test_the_image_has_what_its_steps_use():
    """Everything that is copied exists, and the steps are those of the script, in two stages."""
    text = (K8S / "Dockerfile").read_text()
    for line in re.findall(r"^COPY \S+ (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
    assert re.findall(r"^RUN (k8s/\S+ \w+)$", text, re.MULTILINE) == ["k8s/install.sh serve", "k8s/install.sh train"]
    done = subprocess.run([K8S / "install.sh", "everything"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.startswith("usage: ")) == (2, True)


def test_job_runs_on_the_shared_cluster(manifests):
    spec = only(manifests, "RayJob")["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": only(manifests, "RayCluster")["metadata"]["name"]}
    # KubeRay refuses to delete a cluster that is not the job's own.
    assert spec["shutdownAfterJobFinishes"] is False


def test_service_serves_what_serve_config_says():
    expected = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    expected["proxy_location"] = "EveryNode"
    expected["http_options"]["host"] = "0.0.0.0"  # reached through the cluster's service and network policy
    for application in expected["applications"]:
        application["args"]["storage"] = "/shared/runs"
        if "keys" in application["args"]:
            application["args"]["keys"] = "/shared/keys.json"
    assert served(render(K8S / "overlays" / "cpu")) == expected


def test_the_service_requires_keys(manifests):
    main, *_ = served(manifests)["applications"]
    assert main["args"]["keys"] == "/shared/keys.json"


def test_all_ray_pods_share_the_claimed_volume(manifests):
    claim = only(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pods = [m for m in mappings(only(manifests, "RayCluster")) if "containers" in m]
    assert len(pods) == 1 + len(worker_groups(manifests))
    for pod in pods:
        (volume,) = (v for v in pod["volumes"] if "persistentVolumeClaim" in v)
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {"name": volume["name"], "mountPath": "/shared"} in pod["containers"][0]["volumeMounts"]


def test_secrets_are_described_but_never_applied(manifests):
    assert all(m["kind"] != "Secret" for m in manifests)
    template = (K8S / "base" / "secrets.template.yaml").read_text()
    described = {s["metadata"]["name"]: s["stringData"] for s in parse(template)}
    assert not any(value for data in described.values() for value in data.values())
    assert all(f"create secret generic {name} " in template for name in described)
    wanted = [m["secretKeyRef"] for m in mappings(manifests) if "secretKeyRef" in m]
    assert {reference["name"] for reference in wanted} == described.keys() - {"mavis-ray-token"}
    for reference in wanted:
        assert reference["key"] in described[reference["name"]]
    assert "auth_token" in described["mavis-ray-token"]  # the key KubeRay reads


def opened(manifests, policy: str) -> dict[str, set[int] | str]:
    """Ports of Ray pods that a network policy opens, by peer."""
    (spec,) = (m["spec"] for m in manifests if (m["kind"], m["metadata"]["name"]) == ("NetworkPolicy", policy))
    assert spec["podSelector"] == RAY_PODS
    assert spec["policyTypes"] == ["Ingress"]
    ports = {}
    for rule in spec["ingress"]:
        (peer,) = rule["from"]
        ports[yaml.dump(peer)] = {p["port"] for p in rule.get("ports", [])} or "all"
    return ports


def test_network_policy_opens_nothing_but_the_api_to_the_outside(manifests):
    peers = opened(manifests, "mavis-ray")

    def ports(peer: dict):
        return peers.pop(yaml.dump(peer))

    submitter = only(manifests, "RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    # Processes of a group, and training workers, listen on whatever port is free.
    assert ports({"podSelector": RAY_PODS}) == "all"
    assert ports({"podSelector": {"matchLabels": submitter}}) == {8265}
    assert ports({"namespaceSelector": {"matchLabels": {"mavis-ingress": "true"}}}) == {8000}
    ((operator, of_operator),) = peers.items()
    assert "kuberay-operator" in operator
    assert of_operator == {8265, 8000}


def test_prometheus_reaches_the_metrics_of_every_ray_pod(manifests):
    monitor = only(manifests, "PodMonitor")["spec"]
    assert monitor["selector"] == RAY_PODS
    head = only(manifests, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    named = {port["name"]: port["containerPort"] for port in head["ports"]} | {"metrics": 8080}  # KubeRay's
    scraped = {named[endpoint["port"]] for endpoint in monitor["podMetricsEndpoints"]}
    ((peer, ports),) = opened(manifests, "mavis-metrics").items()
    assert "prometheus" in peer
    assert ports == scraped


def test_the_route_lets_streams_last(manifests):
    (rule,) = only(manifests, "HTTPRoute")["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert backend == {"name": f"{only(manifests, 'RayService')['metadata']['name']}-serve-svc", "port": 8000}
    deadline = arguments_of(served(manifests)["applications"][0]).deadline_s
    for limit in rule["timeouts"].values():
        assert float(limit.removesuffix("s")) > deadline


# Ray's cluster launcher


def prepared(path: Path) -> dict:
    """Filled in and checked the way `ray up` does it, short of calling a cloud or a machine."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    found = prepare_config(yaml.safe_load(path.read_text()))
    validate_config(found)
    return found


@pytest.fixture(scope="module", params=[CLUSTER_YAML, LOCAL_YAML], ids=lambda path: path.name)
def cluster(request) -> dict:
    return prepared(request.param)


def test_cluster_machines():
    cluster = prepared(CLUSTER_YAML)
    types = cluster["available_node_types"]
    assert types.keys() == {"head", "cpu_worker", "gpu_worker"}
    assert cluster["head_node_type"] == "head"
    assert types["head"]["resources"]["CPU"] == 0
    assert types["head"]["max_workers"] == 0
    for name in ("cpu_worker", "gpu_worker"):
        assert types[name]["min_workers"] <= types[name]["max_workers"] <= cluster["max_workers"]


def test_own_machines():
    """Ray makes one type of machine of them, and would shorten their number without a word."""
    cluster = prepared(LOCAL_YAML)
    provider = cluster["provider"]
    assert provider.keys() == {"type", "head_ip", "worker_ips"}
    addresses = [provider["head_ip"], *provider["worker_ips"]]
    assert len(set(addresses)) == len(addresses)
    (workers,) = cluster["available_node_types"].values()
    assert workers["min_workers"] == workers["max_workers"] == len(provider["worker_ips"])
    start = cluster["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in start
    assert "-v /shared:/shared" in cluster["docker"]["run_options"]


def test_cluster_runs_in_token_mode(cluster):
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_cluster_installs_this_project_with_the_tested_versions(cluster):
    (source,) = (remote for remote, local in cluster["file_mounts"].items() if local == ".")
    assert cluster["setup_commands"][-1] == f"cd {source} && k8s/install.sh train"
    assert f"-e PYTHONPATH={source}" in cluster["docker"]["run_options"]
    assert f":{RAY_VERSION}-" in cluster["docker"]["image"]
    assert f"\nray=={RAY_VERSION}\n" in (ROOT / "constraints.txt").read_text()


def test_head_and_workers_meet(cluster):
    assert "--port=6379" in cluster["head_start_ray_commands"][-1]
    assert cluster["worker_start_ray_commands"][-1].startswith("ray start --address=$RAY_HEAD_IP:6379")
