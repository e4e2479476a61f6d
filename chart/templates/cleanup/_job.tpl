{{- /*
    Stops everything that still runs and waits until its pods are gone, because Helm does not own hooks. Its command line
    is its only configuration. Arguments: root, name, hooks, startSeconds.

    The Job's deadline is startSeconds, for a pod that never starts. A pod that starts first extends the deadline by the
    time for its work (--own-job), because a deadline counts from the Job's creation and includes pulling the image.
*/}}
{{- define "llama-lora.cleanup.job" -}}
{{- $values := .root.Values }}
{{- if $values.cleanup.enabled }}
{{- $timeout := int $values.cleanup.timeoutSeconds }}
{{- include "stage.job" (dict
      "root" .root
      "name" .name
      "stage" "cleanup"
      "settings" "cleanup"
      "weight" -10
      "hooks" .hooks
      "deletePolicy" "before-hook-creation,hook-succeeded"
      "needsCluster" true
      "finalStatuses" (list 1 2)
      "activeDeadlineSeconds" .startSeconds
      "command" (list "genvalues" "cluster" "cleanup" "--release" .root.Release.Name "--namespace" .root.Release.Namespace
                      "--workload" $values.workload
                      "--run" (include "llama-lora.run.label" .root)
                      "--timeout-seconds" (toString $timeout)
                      "--own-job" .name (toString (add .startSeconds $timeout 20)))
      "account" (include "llama-lora.account" (dict "root" .root "name" "cleanup"))
      "callsApi" true) }}
{{- end }}
{{- end }}
