{{- /*
    A stage on the Trainium nodes, as a PyTorchJob or a TrainJob: compile and train. Arguments: root, stage, weight.

    Helm considers this hook complete as soon as it exists. So it is created suspended, and its gate, the hook at the next
    weight, releases it, follows it and ends with its outcome. Its name contains the revision and it has no
    before-hook-creation policy, so that a later Helm command never stops a running job.
*/}}
{{- define "stage.workload" -}}
{{- include (printf "stage.%s" .root.Values.workload) . }}
{{- end }}

{{- define "stage.workload.annotations" -}}
llama-lora/stage: {{ .stage }}
helm.sh/hook: post-install,post-upgrade
helm.sh/hook-weight: {{ .weight | quote }}
helm.sh/hook-delete-policy: hook-failed
{{- end }}

{{- /* Kueue must not start what the gate has not released, and puts a job without a queue into the namespace's LocalQueue
       `default`. With a queue, or a prebuilt Workload, that does not exist it stays suspended; the gate changes the label
       (cluster/queueing.py has the reason for the two ways). */}}
{{- define "stage.workload.labels" -}}
{{- $served := .root.Capabilities.APIVersions }}
{{- $labels := include "stage.labels" . | fromYaml }}
{{- if or .root.Values.kueue.queueName ($served.Has "kueue.x-k8s.io/v1beta1") ($served.Has "kueue.x-k8s.io/v1beta2") }}
{{- $held := ternary "prebuilt-workload-name" "queue-name" (eq .root.Values.workload "trainjob") }}
{{- $_ := set $labels (printf "kueue.x-k8s.io/%s" $held) "llama-lora-not-released" }}
{{- end }}
{{- with .root.Values.kueue.priorityClass }}
{{- $_ := set $labels "kueue.x-k8s.io/priority-class" . }}
{{- end }}
{{- toYaml $labels }}
{{- end }}

{{- define "stage.workload.pod" -}}
{{- include "stage.pod" (merge (dict
      "settings" .stage
      "command" (list "llama-lora" .stage "--config" "/etc/llama-lora/run.yaml")
      "account" (include "llama-lora.account" (dict "root" .root "name" "stage"))
      "config" true
      "workspace" true
      "monitored" true
      "trains" true) .) }}
{{- end }}

{{- /* The operator and the Job controller count the restarts of all workers together, and one failure restarts all of them.
       They end the job when this many have started. The gate counts the restarts of each worker. */}}
{{- define "stage.workload.backoffLimit" -}}
{{ add 1 (mul (int .nodes) (int .retries)) }}
{{- end }}

{{- /* A PyTorchJob has only workers: with a Master, the operator adds an init container to the workers that Pod Security
       `restricted` rejects. The workers rendezvous at the first worker (c10d), without etcd. */}}
{{- define "stage.pytorchjob" -}}
{{- $values := .root.Values }}
{{- $name := include "llama-lora.stage.name" . }}
{{- $nodes := int $values.parallelism.nodes }}
{{- $settings := include "stage.settings" (dict "root" .root "settings" .stage) | fromJson -}}
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "stage.workload.labels" . | nindent 4 }}
  annotations:
    {{- include "stage.workload.annotations" . | nindent 4 }}
    {{- if $values.hyperpod.autoResume }}
    sagemaker.amazonaws.com/enable-job-auto-resume: "true"
    sagemaker.amazonaws.com/job-max-retry-count: {{ int $values.hyperpod.maxRetries | quote }}
    {{- end }}
spec:
  nprocPerNode: {{ int $values.parallelism.processesPerNode | quote }}
  elasticPolicy:
    rdzvBackend: c10d
    rdzvHost: {{ $name }}-worker-0
    minReplicas: {{ $nodes }}
    maxReplicas: {{ $nodes }}
  runPolicy:
    suspend: true
    cleanPodPolicy: None      # the job succeeds as soon as one worker does; the others must not be killed then
    backoffLimit: {{ include "stage.workload.backoffLimit" (dict "nodes" $nodes "retries" $settings.backoffLimit) }}
    {{- with $settings.activeDeadlineSeconds }}
    activeDeadlineSeconds: {{ int64 . }}
    {{- end }}
  pytorchReplicaSpecs:
    Worker:
      replicas: {{ $nodes }}
      restartPolicy: OnFailure
      template:
        {{- include "stage.workload.pod" (dict "root" .root "stage" .stage "container" "pytorch") | nindent 8 }}
{{- end }}

{{- /* A TrainJob takes its pods from a TrainingRuntime, which has the same name and, by the gate and cleanup, the same life.
       Trainer gives the container `node` of the ReplicatedJob `node` PET_NNODES, PET_NPROC_PER_NODE and PET_NODE_RANK; with
       PET_RDZV_* the workers rendezvous as those of a PyTorchJob. */}}
{{- define "stage.trainjob" -}}
{{- $values := .root.Values }}
{{- $name := include "llama-lora.stage.name" . }}
{{- $nodes := int $values.parallelism.nodes }}
{{- $settings := include "stage.settings" (dict "root" .root "settings" .stage) | fromJson -}}
{{- $pod := include "stage.workload.pod" (dict "root" .root "stage" .stage "container" "node") | fromYaml -}}
{{- $_ := set $pod.spec "restartPolicy" "OnFailure" -}}
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainingRuntime
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "stage.labels" . | nindent 4 }}
    trainer.kubeflow.org/framework: torch
  annotations:
    {{- include "stage.workload.annotations" (dict "stage" .stage "weight" (sub .weight 1)) | nindent 4 }}
spec:
  mlPolicy:
    numNodes: {{ $nodes }}
    torch: {}
  template:
    metadata:
      labels:
        {{- include "stage.podLabels" . | nindent 8 }}
    spec:
      replicatedJobs:
        - name: node
          replicas: 1
          template:
            metadata:
              labels:
                trainer.kubeflow.org/trainjob-ancestor-step: trainer
            spec:
              backoffLimit: {{ include "stage.workload.backoffLimit" (dict "nodes" $nodes "retries" $settings.backoffLimit) }}
              {{- with $settings.activeDeadlineSeconds }}
              activeDeadlineSeconds: {{ int64 . }}
              {{- end }}
              podReplacementPolicy: Failed      # not while the pod to replace saves a checkpoint
              template:
                {{- toYaml $pod | nindent 16 }}
---
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "stage.workload.labels" . | nindent 4 }}
  annotations:
    {{- include "stage.workload.annotations" . | nindent 4 }}
    llama-lora/retries: {{ int $settings.backoffLimit | quote }}      # of each worker; for the gate
    llama-lora/grace-period-seconds: {{ int ($pod.spec.terminationGracePeriodSeconds | default 30) | quote }}
spec:
  suspend: true
  runtimeRef:
    apiGroup: trainer.kubeflow.org
    kind: TrainingRuntime
    name: {{ $name }}
  trainer:
    numNodes: {{ $nodes }}
    numProcPerNode: {{ int $values.parallelism.processesPerNode }}
    env:
      - name: PET_RDZV_BACKEND
        value: c10d
      - name: PET_RDZV_ENDPOINT
        value: {{ $name }}-node-0-0.{{ $name }}      # the host name of the first worker, in the JobSet's Service
{{- end }}

{{- /* The gate of a PyTorchJob or TrainJob, at the next weight. It ends with status 1 if the stage has failed after its
       retries. Arguments: root, stage (of the job), weight. */}}
{{- define "stage.gate" -}}
{{- $gate := printf "%s-gate" .stage }}
{{- include "stage.job" (dict
      "root" .root
      "name" (include "llama-lora.stage.name" (dict "root" .root "stage" $gate))
      "stage" $gate
      "settings" "gate"
      "weight" .weight
      "needsCluster" true
      "command" (list "genvalues" "cluster" "gate" "--config" "/etc/llama-lora/cluster.yaml"
                      "--run-config" "/etc/llama-lora/run.yaml" "--stage" .stage
                      "--job" (include "llama-lora.stage.name" .))
      "account" (include "llama-lora.account" (dict "root" .root "name" "gate"))
      "callsApi" true
      "finalStatuses" (list 1 2)
      "config" true
      "workspace" true) }}
{{- end }}

{{- /* Rules of a Role for PyTorchJobs or TrainJobs.

       verbs            for the objects of the release's workload
       others           for those of the other one, which an earlier revision may have left; none where it is not served
       runtimes         for TrainingRuntimes, with each TrainJob */}}
{{- define "stage.workload.rules" -}}
{{- range $workload, $api := dict "pytorchjob" "kubeflow.org/v1/PyTorchJob" "trainjob" "trainer.kubeflow.org/v1alpha1/TrainJob" }}
{{- $own := eq $workload $.root.Values.workload }}
{{- $verbs := ternary $.verbs (default list $.others) $own }}
{{- if and $verbs (or $own ($.root.Capabilities.APIVersions.Has $api)) }}
- apiGroups: [{{ splitList "/" $api | first }}]
  resources: [{{ $workload }}s]
  verbs: {{ toJson $verbs }}
{{- if and (eq $workload "trainjob") (or $own (has "delete" $verbs)) }}
- apiGroups: [trainer.kubeflow.org]
  resources: [trainingruntimes]
  verbs: {{ toJson $.runtimes }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
