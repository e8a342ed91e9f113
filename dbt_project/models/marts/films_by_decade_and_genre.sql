select
    film.decade,
    movie_genre.genre,
    count(*)::integer as film_count,
    count(film.tomato_rating)::integer as rated_film_count,
    avg(film.tomato_rating)::decimal(4, 2) as mean_tomato_rating,
    avg(film.metascore)::decimal(5, 2) as mean_metascore,
    avg(film.runtime_min)::decimal(6, 1) as mean_runtime_min,
    sum(film.oscars)::integer as oscars,
    sum(film.box_office_usd)::decimal(18, 2) as box_office_usd,
    -- The lowest number decides between equals, so that two builds of the same data agree.
    first(film.title order by film.tomato_rating desc nulls last, film.tomato_reviews desc nulls last, film.movie_id)
        as best_film
from {{ ref('int_film') }} as film
inner join {{ ref('stg_movie_genre') }} as movie_genre on movie_genre.movie_id = film.movie_id
where film.status = 'released' and film.decade is not null
group by film.decade, movie_genre.genre
order by film.decade, movie_genre.genre
