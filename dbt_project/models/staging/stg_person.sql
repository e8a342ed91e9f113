select
    person_id,
    name,
    born_on,
    updated_at,
    _committed_at as committed_at
from {{ source('studio', 'person') }}
