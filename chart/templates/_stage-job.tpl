{{- /*
    A stage that is a Job. Arguments: those of stage.pod, and

    weight           the hook's weight; without it, the Job is not a hook
    hooks            default: post-install,post-upgrade
    deletePolicy     default: before-hook-creation
    needsCluster     `genvalues local` skips the stage
    queue            Kueue's LocalQueue
    finalStatuses    exit statuses that are not retried; default: 2, the user must change something
    activeDeadlineSeconds      overrides the settings'
*/}}
{{- define "stage.job" -}}
{{- $settings := include "stage.settings" . | fromJson -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ .name }}
  namespace: {{ .root.Release.Namespace | quote }}
  labels:
    {{- $queue := ternary (dict "kueue.x-k8s.io/queue-name" .queue) dict (ne (.queue | default "") "") }}
    {{- include "stage.override" (dict "base" (include "stage.labels" . | fromYaml) "over" $queue) | nindent 4 }}
  annotations:
    llama-lora/stage: {{ .stage }}
    {{- if .needsCluster }}
    llama-lora/needs-cluster: "true"
    {{- end }}
    {{- if hasKey . "weight" }}
    helm.sh/hook: {{ .hooks | default "post-install,post-upgrade" }}
    helm.sh/hook-weight: {{ .weight | quote }}
    helm.sh/hook-delete-policy: {{ .deletePolicy | default "before-hook-creation" }}
    helm.sh/hook-output-log-policy: hook-failed       # prints the log, since Helm 3.18
    {{- end }}
spec:
  backoffLimit: {{ int $settings.backoffLimit }}
  {{- with .activeDeadlineSeconds | default $settings.activeDeadlineSeconds }}
  activeDeadlineSeconds: {{ int64 . }}
  {{- end }}
  podFailurePolicy:
    rules:
      - action: FailJob
        onExitCodes:
          containerName: {{ .container | default .stage }}
          operator: In
          values: {{ .finalStatuses | default (list 2) | toJson }}
        onPodConditions: []   # required by the OpenAPI schema of Kubernetes 1.28, which Helm checks
      - action: Ignore        # a drained or lost node does not count as a retry
        onPodConditions:
          - type: DisruptionTarget
            status: "True"
  template:
    {{- include "stage.pod" (merge (dict "container" .stage) .) | nindent 4 }}
{{- end }}

{{- /* A stage of the trainer that runs on CPU nodes, with the run config and the volume, without API permissions.
       Arguments: root, stage, weight, and overrides of the dict below. */}}
{{- define "stage.trainer" -}}
{{- $own := dict
      "name" (include "llama-lora.stage.name" .)
      "settings" .stage
      "command" (list "llama-lora" .stage "--config" "/etc/llama-lora/run.yaml")
      "account" (include "llama-lora.account" (dict "root" .root "name" "stage"))
      "queue" .root.Values.kueue.cpuQueueName
      "config" true
      "workspace" true
      "monitored" true }}
{{- include "stage.job" (mergeOverwrite $own .) }}
{{- end }}
