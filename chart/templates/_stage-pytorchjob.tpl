{{- /*
    A stage on the Trainium nodes, as a PyTorchJob: compile and train. Arguments: root, stage, weight.

    Helm considers this hook complete as soon as it exists. So it is created suspended, and its gate, the hook at the next
    weight, releases it, follows it and ends with its outcome. Its name contains the revision and it has no
    before-hook-creation policy, so that a later Helm command never stops a running job.

    It has only workers: with a Master, the operator adds an init container to the workers that Pod Security `restricted`
    rejects. The workers rendezvous at the first worker (c10d), without etcd.
*/}}
{{- define "stage.pytorchjob" -}}
{{- $values := .root.Values }}
{{- $name := include "llama-lora.stage.name" . }}
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
    cleanPodPolicy: None      # the job succeeds as soon as one worker does; the others must not be killed then
    # The operator counts the restarts of all workers together, and one failure restarts all of them. It ends the job
    # when this many have started. The gate counts the restarts of each worker.
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
              "monitored" true
              "trains" true) | nindent 8 }}
{{- end }}

{{- /* The gate of a PyTorchJob, at the next weight. It ends with status 1 if the stage has failed after its retries.
       Arguments: root, stage (of the PyTorchJob), weight. */}}
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
      "account" (include "llama-lora.gate.account" .root)
      "callsApi" true
      "finalStatuses" (list 1 2)
      "config" true
      "workspace" true) }}
{{- end }}
