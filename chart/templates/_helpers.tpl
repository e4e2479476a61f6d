{{- /* Labels of all objects. Arguments: root, component. */}}
{{- define "llama-lora.labels" -}}
{{- $root := .root }}
{{- $labels := dict
      "helm.sh/chart" (printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_")
      "app.kubernetes.io/name" (include "llama-lora.name" $root)
      "app.kubernetes.io/instance" $root.Release.Name
      "app.kubernetes.io/version" $root.Chart.AppVersion
      "app.kubernetes.io/managed-by" $root.Release.Service
      "app.kubernetes.io/part-of" "llama-lora"
      "app.kubernetes.io/component" .component }}
{{- include "stage.override" (dict "base" $root.Values.commonLabels "over" $labels) }}
{{- end }}

{{- /* Labels of a stage's pods: those above and the run. Arguments: root, stage. */}}
{{- define "stage.podLabels" -}}
{{- $labels := include "llama-lora.labels" (dict "root" .root "component" .stage) | fromYaml }}
{{- $_ := set $labels "llama-lora/run" (include "llama-lora.run.label" .root) }}
{{- toYaml $labels }}
{{- end }}

{{- /* Labels of a stage's Job or PyTorchJob: those of its pods, and jobLabels. Arguments: root, stage, settings (default:
       the stage). */}}
{{- define "stage.labels" -}}
{{- $settings := include "stage.settings" (dict "root" .root "settings" (.settings | default .stage)) | fromJson }}
{{- include "stage.override" (dict "base" $settings.jobLabels "over" (include "stage.podLabels" . | fromYaml)) }}
{{- end }}

{{- define "llama-lora.image" -}}
{{- $image := .Values.image }}
{{- if $image.digest }}
{{- $image.repository }}@{{ $image.digest }}
{{- else }}
{{- $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- /* An object of extraObjects, rendered, with the chart's labels. If its templates fail, Helm's message quotes the text
       from its comment on, which names the key. Arguments: root, name. */}}
{{- define "llama-lora.extraObject" -}}
{{- $comment := printf "# extraObjects.%s" (regexReplaceAll "[{\\s]+" .name " ") }}
{{- $object := tpl (printf "%s\n%s" $comment (get .root.Values.extraObjects .name | toYaml)) .root | fromYaml }}
{{- $metadata := $object.metadata | default dict }}
{{- $labels := include "llama-lora.labels" (dict "root" .root "component" "extra") | fromYaml }}
{{- $_ := set $metadata "labels" (merge ($metadata.labels | default dict) $labels) }}
{{- $_ := set $metadata "name" ($metadata.name | default .name) }}
{{- $_ := set $object "metadata" $metadata }}
{{- toYaml $object }}
{{- end }}

{{- /* "true" if the stages are hooks of this release, "" if a runner installs them. */}}
{{- define "llama-lora.attached" -}}
{{- if eq .Values.pipeline.mode "attached" }}true{{ end }}
{{- end }}

{{- /* The stages that the values run, in this order. */}}
{{- define "llama-lora.stages" -}}
{{- $stages := list "preflight" }}
{{- if .Values.storage.prepare.enabled }}{{ $stages = append $stages "storage-prepare" }}{{ end }}
{{- $stages = append $stages "tokenize" }}
{{- if .Values.rehearse.enabled }}{{ $stages = append $stages "rehearse" }}{{ end }}
{{- $stages = append $stages "compile" }}
{{- if and (eq .Values.backend "xla") (eq .Values.compile.runsOn "cpu") }}{{ $stages = append $stages "neff" }}{{ end }}
{{- $stages = concat $stages (list "train" "consolidate" "merge") }}
{{- if .Values.evaluation.enabled }}{{ $stages = append $stages "evaluate" }}{{ end }}
{{- if include "llama-lora.publishes" . }}{{ $stages = append $stages "publish" }}{{ end }}
{{- $stages | toJson }}
{{- end }}

{{- /* "true" if the stage is a hook of this release. Arguments: root, stage. */}}
{{- define "llama-lora.runs" -}}
{{- if and (include "llama-lora.attached" .root) (has .stage (include "llama-lora.stages" .root | fromJsonArray)) }}true{{ end }}
{{- end }}

{{- /* "true" if there is something to publish. */}}
{{- define "llama-lora.publishes" -}}
{{- $publish := .Values.publish }}
{{- if or $publish.s3.uri $publish.hub.adapter $publish.hub.merged }}true{{ end }}
{{- end }}

{{- /* The Secret with the token that reads from the Hub, as {name, key}; the name is empty without one. */}}
{{- define "llama-lora.token" -}}
{{- dict "name" .Values.huggingFace.tokenSecret "key" .Values.huggingFace.tokenKey | toYaml }}
{{- end }}

{{- /* The Secret with the token of the stage publish, as {name, key}; the name is empty without a repository to write to. */}}
{{- define "llama-lora.publish.token" -}}
{{- $hub := .Values.publish.hub }}
{{- if not (or $hub.adapter $hub.merged) }}
{{- dict "name" "" "key" "" | toYaml }}
{{- else if $hub.tokenSecret }}
{{- dict "name" $hub.tokenSecret "key" $hub.tokenKey | toYaml }}
{{- else }}
{{- include "llama-lora.token" . }}
{{- end }}
{{- end }}

{{- /* The Secrets of the release besides huggingFace.tokenSecret, as {name, key}; no key: any may be there. */}}
{{- define "llama-lora.secrets" -}}
{{- $secrets := list (include "llama-lora.publish.token" . | fromYaml) (dict "name" .Values.monitoring.secretName "key" "") }}
{{- range $stage := include "llama-lora.stages" . | fromJsonArray }}
{{- if has $stage (include "stage.ofTrainer" . | fromJsonArray) }}
{{- $settings := include "stage.settings" (dict "root" $ "settings" $stage) | fromJson }}
{{- range $from := $settings.extraEnvSecrets }}
{{- if not $from.optional }}{{ $secrets = append $secrets (pick $from "name" "key") }}{{ end }}
{{- end }}
{{- range $source := $settings.extraEnvFrom }}
{{- with $source.secretRef }}
{{- if not .optional }}{{ $secrets = append $secrets (dict "name" .name "key" "") }}{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- $first := include "llama-lora.token" . | fromYaml }}
{{- $others := list }}
{{- range $secret := $secrets }}
{{- if and $secret.name (ne (toJson $secret) (toJson $first)) }}
{{- $others = append $others $secret }}
{{- end }}
{{- end }}
{{- uniq $others | toJson }}
{{- end }}
