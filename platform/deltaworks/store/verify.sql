-- What verify.py compares. Braces are filled in with quoted identifiers.

-- name: copy
create table {copy} as select * from {original} at (version => {version});

-- name: differing
-- Keys that only one side has, or whose rows differ; null-safe, and NaN equals NaN.
create or replace temp table differing as
select {keys}
from {source} as s
full join {stored} as l on {same_key}
where s._is_here is null or l._is_here is null or {differs};

-- name: differing_bags
create or replace temp table differing as
(select {values} from {source} except all select {values} from {stored})
union all
(select {values} from {stored} except all select {values} from {source});

-- name: sample
select {key} from differing order by all limit {limit};
