{{- /*
    A stage on the Trainium nodes, as a PyTorchJob: compile and train. Arguments: root, stage, weight.

    Helm counts this hook as done as soon as it exists. So it is made suspended, and its gate, the hook at the next
    weight, releases it, follows it and ends as it ends. It is named with the revision and has no before-hook-creation:
    a later Helm command never kills a healthy run.

    Workers only, because the operator gives the workers of a job with a Master an init container that Pod Security
    `restricted` refuses; they find each other at the first worker (c10d), without etcd.
*/}}
{{- define "stage.pytorchjob" -}}
{{- $values := .root.Values }}
{{- $name := include (printf "llama-lora.%s.name" .stage) .root }}
{{- $nodes := int $values.parallelism.nodes }}
{{- $settings := include "stage.settings" (dict "root" .root "settings" .stage) | fromYaml -}}
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {{ $name }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- include "stage.labels" . | nindent 4 }}
    {{- with $values.kueue.priorityClass }}
    kueue.x-k8s.io/priority-class: {{ . | quote }}
    {{- end }}
  annotations:
    llama-lora/stage: {{ .stage }}
    helm.sh/hook: post-install,post-upgrade
    helm.sh/hook-weight: {{ .weight | quote }}
    helm.sh/hook-delete-policy: hook-failed
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
    cleanPodPolicy: None      # the job has succeeded as soon as one worker has; the others must not be killed for it
    # The operator adds up the restarts of all workers, of which one takes the others with it, and ends the job as soon
    # as this many have begun. The gate counts them for each worker.
    backoffLimit: {{ add 1 (mul $nodes (int $settings.backoffLimit)) }}
    {{- with $settings.activeDeadlineSeconds }}
    activeDeadlineSeconds: {{ int64 . }}
    {{- end }}
  pytorchReplicaSpecs:
    Worker:
      replicas: {{ $nodes }}
      restartPolicy: OnFailure
      template:
        {{- include "stage.pod" (dict
              "root" .root
              "stage" .stage
              "settings" .stage
              "container" "pytorch"
              "command" (list "llama-lora" .stage "--config" "/etc/llama-lora/run.yaml")
              "account" (include "llama-lora.stage.account" .root)
              "config" true
              "workspace" true
              "trains" true) | nindent 8 }}
{{- end }}

{{- /* The gate of a PyTorchJob, at the next weight. It ends with status 1 when the stage has failed, after the retries
       of its own. Arguments: root, stage (of the PyTorchJob), weight. */}}
{{- define "stage.gate" -}}
{{- $gate := printf "%s-gate" .stage }}
{{- include "stage.job" (dict
      "root" .root
      "name" (include (printf "llama-lora.%s.name" $gate) .root)
      "stage" $gate
      "settings" "gate"
      "weight" .weight
      "needsCluster" true
      "command" (list "genvalues" "cluster" "gate" "--config" "/etc/llama-lora/cluster.yaml"
                      "--run-config" "/etc/llama-lora/run.yaml" "--stage" .stage
                      "--job" (include (printf "llama-lora.%s.name" .stage) .root))
      "account" (include "llama-lora.gate.account" .root)
      "callsApi" true
      "finalStatuses" (list 1 2)
      "config" true
      "workspace" true) }}
{{- end }}
