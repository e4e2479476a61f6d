{{- /* Labels of all objects. Arguments: root, component. */}}
{{- define "llama-lora.labels" -}}
{{- $root := .root -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ include "llama-lora.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: llama-lora
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- /* Labels of a stage's objects and pods: those above and the run. Arguments: root, stage. */}}
{{- define "stage.labels" -}}
{{ include "llama-lora.labels" (dict "root" .root "component" .stage) }}
llama-lora/run: {{ include "llama-lora.run.label" .root | quote }}
{{- end }}

{{- define "llama-lora.image" -}}
{{- $image := .Values.image }}
{{- if $image.digest }}
{{- $image.repository }}@{{ $image.digest }}
{{- else }}
{{- $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- /* "true" if the stages are hooks of this release, "" if a runner installs them. */}}
{{- define "llama-lora.attached" -}}
{{- if eq .Values.pipeline.mode "attached" }}true{{ end }}
{{- end }}
