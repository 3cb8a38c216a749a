"""ray_cluster.yaml and k8s/: valid as far as can be checked without machines, and consistent with each other and with
the files they name."""

import shutil
import subprocess
from collections.abc import Iterator
from decimal import Decimal

import pytest
import yaml

from tests.root import ROOT

K8S = ROOT / "k8s"
CLUSTER_YAML = ROOT / "ray_cluster.yaml"
RAY_VERSION = "2.60.0"
QUANTITY_SUFFIXES = {"m": Decimal("0.001"), "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse(text: str) -> list[dict]:
    return [document for document in yaml.safe_load_all(text) if document]


@pytest.fixture(scope="module")
def manifests() -> list[dict]:
    """What `kubectl apply -k k8s/` would send; without kubectl the files as written."""
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "kustomize", str(K8S)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return parse(done.stdout)
    listed = yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]
    return [document for name in listed for document in parse((K8S / name).read_text())]


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


# k8s/


def test_every_resource_is_there(manifests):
    kinds = [m["kind"] for m in manifests]
    for kind in ("RayCluster", "RayJob", "RayService", "PersistentVolumeClaim", "NetworkPolicy"):
        assert kind in kinds
    assert all(m["apiVersion"] == "ray.io/v1" for m in manifests if m["kind"].startswith("Ray"))


def test_names_are_unique_within_a_kind(manifests):
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(names) == len(set(names))


def test_every_container_states_what_it_needs(manifests):
    found = containers(manifests)
    assert len(found) >= 5  # head, two kinds of workers, submitter, Valkey
    for container in found:
        requests, limits = (container["resources"][k] for k in ("requests", "limits"))
        assert {"cpu", "memory"} <= requests.keys() == limits.keys(), container["name"]
        for resource, wanted in requests.items():
            assert 0 < quantity(wanted) <= quantity(limits[resource]), (container["name"], resource)


def test_autoscaler_states_what_it_needs(manifests):
    resources = only(manifests, "RayCluster")["spec"]["autoscalerOptions"]["resources"]
    assert all(quantity(v) > 0 for group in ("requests", "limits") for v in resources[group].values())


def test_ray_takes_whole_cpus_and_gpus_from_worker_limits(manifests):
    """A fractional CPU limit would be rounded up by KubeRay, and Ray would place more than the pod can run."""
    for container in ray_containers(only(manifests, "RayCluster")):
        for resource in ("cpu", "nvidia.com/gpu"):
            wanted = quantity(container["resources"]["limits"].get(resource, "0"))
            assert wanted == wanted.to_integral_value(), container["name"]


def test_worker_groups(manifests):
    spec = only(manifests, "RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    assert groups["gpu"]["minReplicas"] == groups["gpu"]["replicas"] == 0
    for name, group in groups.items():
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "gpu")


def test_the_service_gets_the_cluster_spec(manifests):
    rule = yaml.safe_load((K8S / "kustomization.yaml").read_text())["replacements"]
    assert rule[0]["source"] == {"kind": "RayCluster", "fieldPath": "spec"}
    service = only(manifests, "RayService")["spec"]
    if shutil.which("kubectl"):
        assert service["rayClusterConfig"] == only(manifests, "RayCluster")["spec"]


def test_every_ray_cluster_asks_for_a_token(manifests):
    specs = [m for m in mappings(manifests) if "headGroupSpec" in m]
    assert specs
    for spec in specs:
        assert spec["authOptions"] == {"mode": "token", "secretName": "mavis-ray-token"}


def test_one_image_and_one_ray_version(manifests):
    assert len({container["image"] for container in ray_containers(manifests)}) == 1
    assert {m["rayVersion"] for m in mappings(manifests) if "rayVersion" in m} == {RAY_VERSION}
    assert f"FROM rayproject/ray:{RAY_VERSION}-" in (K8S / "Dockerfile").read_text()
    (renamed,) = yaml.safe_load((K8S / "kustomization.yaml").read_text())["images"]
    for guide in ("Dockerfile", "README.md"):
        assert f"{renamed['newName']}:{renamed['newTag']}" in (K8S / guide).read_text()


def test_job_runs_the_quickstart_on_the_shared_cluster(manifests):
    spec = only(manifests, "RayJob")["spec"]
    assert spec["entrypoint"] == "python -m jobs.pipeline --config jobs/configs/quickstart.yaml storage=/shared/runs"
    assert spec["clusterSelector"] == {"ray.io/cluster": only(manifests, "RayCluster")["metadata"]["name"]}
    # KubeRay refuses to delete a cluster that is not the job's own.
    assert spec["shutdownAfterJobFinishes"] is False


@pytest.mark.parametrize("name", ["constraints.txt", "jobs/configs/quickstart.yaml", "serve/config.yaml"])
def test_files_that_manifests_rely_on_exist(name):
    assert (ROOT / name).is_file()


def test_service_serves_what_serve_config_says(manifests):
    served = yaml.safe_load(only(manifests, "RayService")["spec"]["serveConfigV2"])
    expected = yaml.safe_load((ROOT / "serve" / "config.yaml").read_text())
    expected["http_options"]["host"] = "0.0.0.0"  # reached through the cluster's service and network policy
    for application in expected["applications"]:
        application["args"]["storage"] = "/shared/runs"
        if "keys" in application["args"]:
            application["args"]["keys"] = "/shared/keys.json"
    assert served == expected


def test_all_ray_pods_share_the_claimed_volume(manifests):
    claim = only(manifests, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pods = [m for m in mappings(only(manifests, "RayCluster")) if "containers" in m]
    assert len(pods) == 3
    for pod in pods:
        (volume,) = pod["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = pod["containers"][0]["volumeMounts"]
        assert mount == {"name": volume["name"], "mountPath": "/shared"}


def test_secrets_are_described_but_never_applied(manifests):
    assert all(m["kind"] != "Secret" for m in manifests)
    described = {s["metadata"]["name"]: s["stringData"] for s in parse((K8S / "secrets.template.yaml").read_text())}
    assert not any(value for data in described.values() for value in data.values())
    wanted = [m["secretKeyRef"] for m in mappings(manifests) if "secretKeyRef" in m]
    assert wanted
    for reference in wanted:
        assert reference["key"] in described[reference["name"]]
    assert "auth_token" in described["mavis-ray-token"]  # the key KubeRay reads


def test_network_policy_opens_nothing_but_the_api_to_the_outside(manifests):
    (policy,) = (m["spec"] for m in manifests if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "mavis-ray")
    ray_pods = {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    assert policy["podSelector"] == ray_pods
    assert policy["policyTypes"] == ["Ingress"]

    peers = {}
    for rule in policy["ingress"]:
        (peer,) = rule["from"]
        peers[yaml.dump(peer)] = {p["port"] for p in rule.get("ports", [])} or "all"

    def ports(peer: dict):
        return peers.pop(yaml.dump(peer))

    submitter = only(manifests, "RayJob")["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    assert ports({"podSelector": ray_pods}) == "all"
    assert ports({"podSelector": {"matchLabels": submitter}}) == {8265}
    assert ports({"namespaceSelector": {"matchLabels": {"mavis-ingress": "true"}}}) == {8000}
    ((operator, opened),) = peers.items()
    assert "kuberay-operator" in operator
    assert opened == {8265, 8000}


# ray_cluster.yaml


@pytest.fixture(scope="module")
def cluster() -> dict:
    """Filled in and checked the way `ray up` does it, short of calling the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(CLUSTER_YAML.read_text()))
    validate_config(prepared)
    return prepared


def test_cluster_file_passes_rays_own_validation(cluster):
    assert cluster["head_node_type"] == "head"
    assert cluster["available_node_types"].keys() == {"head", "cpu_worker", "gpu_worker"}


def test_cluster_machines(cluster):
    types = cluster["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert types["head"]["max_workers"] == 0
    assert types["gpu_worker"]["min_workers"] == 0
    for name in ("cpu_worker", "gpu_worker"):
        assert types[name]["min_workers"] <= types[name]["max_workers"] <= cluster["max_workers"]


def test_cluster_runs_in_token_mode(cluster):
    assert "-e RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


def test_cluster_installs_this_project_with_the_tested_versions(cluster):
    (source,) = (remote for remote, local in cluster["file_mounts"].items() if local == ".")
    assert f'cd {source} && pip install -c constraints.txt -e ".[train,s3]"' in cluster["setup_commands"]
    assert f"-e PYTHONPATH={source}" in cluster["docker"]["run_options"]
    assert f":{RAY_VERSION}-" in cluster["docker"]["image"]
