"""The fields of Kubernetes' objects that k8s/ uses, with their types: a misspelt one is an error.

Those of Ray's kinds are from the schema of KubeRay 1.7. A field that k8s/ begins to use is added here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Labels = dict[str, str]
Port = int | str
Resources = dict[Literal["requests", "limits"], dict[str, str]]


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Meta(Fields):
    name: str
    namespace: str | None = None
    labels: Labels = {}


class Selector(Fields):
    matchLabels: Labels = {}
    matchExpressions: list[Requirement] = []


class Requirement(Fields):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]


# Pods


class KeyRef(Fields):
    name: str
    key: str
    optional: bool = False


class Source(Fields):
    secretKeyRef: KeyRef


class Variable(Fields):
    name: str
    value: str | None = None
    valueFrom: Source | None = None


class ContainerPort(Fields):
    name: str = Field(max_length=15)
    containerPort: int


class Privileges(Fields):
    allowPrivilegeEscalation: Literal[False]
    capabilities: dict[Literal["drop"], list[str]]


class TcpSocket(Fields):
    port: Port


class Probe(Fields):
    tcpSocket: TcpSocket


class Mount(Fields):
    name: str
    mountPath: str


class Container(Fields):
    name: str
    image: str
    args: list[str] = []
    env: list[Variable] = []
    ports: list[ContainerPort] = []
    readinessProbe: Probe | None = None
    resources: Resources
    securityContext: Privileges
    volumeMounts: list[Mount] = []


class Claim(Fields):
    claimName: str


class EmptyDir(Fields):
    medium: Literal["Memory"]
    sizeLimit: str


class Volume(Fields):
    name: str
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class Seccomp(Fields):
    type: Literal["RuntimeDefault"]


class PodSecurity(Fields):
    runAsNonRoot: Literal[True]
    runAsUser: int
    fsGroup: int | None = None
    fsGroupChangePolicy: Literal["OnRootMismatch", "Always"] | None = None
    seccompProfile: Seccomp


class Toleration(Fields):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class Pod(Fields):
    containers: list[Container] = Field(min_length=1)
    securityContext: PodSecurity
    automountServiceAccountToken: bool = True
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    volumes: list[Volume] = []
    nodeSelector: Labels = {}
    tolerations: list[Toleration] = []


class LabelsOnly(Fields):
    labels: Labels


class PodTemplate(Fields):
    metadata: LabelsOnly | None = None
    spec: Pod


# Ray


class Auth(Fields):
    mode: Literal["disabled", "token"]
    secretName: str


class Password(Fields):
    valueFrom: Source


class FaultTolerance(Fields):
    redisAddress: str
    redisPassword: Password


class Autoscaler(Fields):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: int
    resources: Resources
    securityContext: Privileges


class HeadGroup(Fields):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int


class RayClusterSpec(Fields):
    rayVersion: str
    authOptions: Auth
    gcsFaultToleranceOptions: FaultTolerance
    enableInTreeAutoscaling: bool
    autoscalerOptions: Autoscaler
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayServiceSpec(Fields):
    serveConfigV2: str
    excludeHeadPodFromServeSvc: bool
    rayClusterConfig: RayClusterSpec | None = None  # filled in by kustomize


class RayJobSpec(Fields):
    clusterSelector: Labels
    entrypoint: str
    shutdownAfterJobFinishes: bool
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    submitterPodTemplate: PodTemplate


# Everything else


class ClaimSpec(Fields):
    accessModes: list[Literal["ReadWriteOnce", "ReadWriteMany"]]
    resources: Resources
    storageClassName: str | None = None


class DeploymentSpec(Fields):
    replicas: int
    selector: Selector
    strategy: dict[Literal["type"], Literal["Recreate", "RollingUpdate"]]
    template: PodTemplate


class ServicePort(Fields):
    name: str
    port: int
    targetPort: Port


class ServiceSpec(Fields):
    selector: Labels
    ports: list[ServicePort]


class Peer(Fields):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None


class PolicyPort(Fields):
    protocol: Literal["TCP", "UDP"]
    port: Port


class Rule(Fields):
    from_: list[Peer] = Field(alias="from", min_length=1)
    ports: list[PolicyPort] = []


class NetworkPolicySpec(Fields):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Rule]


class MetricsEndpoint(Fields):
    port: str


class PodMonitorSpec(Fields):
    selector: Selector
    podTargetLabels: list[str]
    podMetricsEndpoints: list[MetricsEndpoint]


class ParentRef(Fields):
    name: str
    namespace: str


class BackendRef(Fields):
    name: str
    port: int


class Timeouts(Fields):
    request: str = Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")
    backendRequest: str = Field(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}$")


class RouteRule(Fields):
    backendRefs: list[BackendRef]
    timeouts: Timeouts


class HTTPRouteSpec(Fields):
    parentRefs: list[ParentRef]
    hostnames: list[str]
    rules: list[RouteRule]


SPECS: dict[tuple[str, str], type[Fields] | None] = {
    ("v1", "Namespace"): None,
    ("v1", "PersistentVolumeClaim"): ClaimSpec,
    ("v1", "Service"): ServiceSpec,
    ("apps/v1", "Deployment"): DeploymentSpec,
    ("networking.k8s.io/v1", "NetworkPolicy"): NetworkPolicySpec,
    ("ray.io/v1", "RayCluster"): RayClusterSpec,
    ("ray.io/v1", "RayJob"): RayJobSpec,
    ("ray.io/v1", "RayService"): RayServiceSpec,
    ("monitoring.coreos.com/v1", "PodMonitor"): PodMonitorSpec,
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): HTTPRouteSpec,
}


class Manifest(Fields):
    apiVersion: str
    kind: str
    metadata: Meta
    spec: Any = None


def check(manifest: dict[str, Any]) -> None:
    """Raises ValidationError or KeyError for a kind, field or type that k8s/ does not use."""
    checked = Manifest.model_validate(manifest)
    spec = SPECS[checked.apiVersion, checked.kind]
    if spec is not None:
        spec.model_validate(checked.spec)
