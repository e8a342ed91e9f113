-- Fresh and rotten reviews are all reviews there are.
select movie_id, fresh, rotten, tomato_reviews
from {{ ref('stg_rating') }}
where fresh + rotten <> tomato_reviews
