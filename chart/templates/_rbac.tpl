{{- /*
    A ServiceAccount, its Role and its RoleBinding, all with the account's name.

    Arguments: root, component, account (name), rules (YAML), annotations (optional)
*/}}
{{- define "rbac.account-with-role" -}}
{{- $metadata := include "rbac.metadata" . -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- $metadata | nindent 2 }}
automountServiceAccountToken: false     # pods that need the token set this to true
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- $metadata | nindent 2 }}
rules:
  {{- .rules | nindent 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- $metadata | nindent 2 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .account }}
subjects:
  - kind: ServiceAccount
    name: {{ .account }}
    namespace: {{ .root.Release.Namespace | quote }}
{{- end }}

{{- define "rbac.metadata" -}}
name: {{ .account }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "llama-lora.labels" (dict "root" .root "component" .component) | nindent 2 }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

